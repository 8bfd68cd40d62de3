"""The questions, a file each: what is compared, and how its rows become a table and a picture."""
