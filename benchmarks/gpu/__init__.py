"""The GPU benchmark: ``run`` is the command, ``section`` the process of one of its sections, the rest its tables."""
