# find_package(ep_kernels) for C++ programs: the target ep_kernels::ep_kernels has the library and <ep/ops.h>. The program
# links to torch itself (>= 2.10); no path of torch is written down here.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)
set(EP_CONFIG_DIR ${CMAKE_INSTALL_LIBDIR}/cmake/ep_kernels)

target_include_directories(ep_kernels INTERFACE $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
target_compile_features(ep_kernels INTERFACE cxx_std_17)
# The library only registers ops and exports nothing, so a linker would leave it out as unused.
target_link_options(ep_kernels INTERFACE LINKER:--no-as-needed)

install(TARGETS ep_kernels EXPORT ep_kernels LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(FILES csrc/include/ep/ops.h DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/ep)
install(EXPORT ep_kernels NAMESPACE ep_kernels:: FILE ep_kernelsConfig.cmake DESTINATION ${EP_CONFIG_DIR})
write_basic_package_version_file(
  ${CMAKE_BINARY_DIR}/ep_kernelsConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_BINARY_DIR}/ep_kernelsConfigVersion.cmake DESTINATION ${EP_CONFIG_DIR})
