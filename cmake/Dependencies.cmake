# Every package that Foretoken builds with. Debian's names: see launch/setup.sh.
find_package(PkgConfig REQUIRED)
find_package(Threads REQUIRED)
find_package(cppzmq REQUIRED)             # cppzmq
find_package(msgpack REQUIRED)            # msgpackc-cxx
find_package(nlohmann_json REQUIRED)      # nlohmann_json::nlohmann_json
find_package(CLI11 REQUIRED)              # CLI11::CLI11
find_package(tomlplusplus REQUIRED)       # tomlplusplus::tomlplusplus
find_package(spdlog REQUIRED)             # spdlog::spdlog
find_package(prometheus-cpp REQUIRED)     # prometheus-cpp::core, ::pull
find_package(OpenSSL REQUIRED)            # OpenSSL::Crypto
find_package(hwy QUIET)
pkg_check_modules(PCRE2 REQUIRED IMPORTED_TARGET libpcre2-8)
pkg_check_modules(ICU REQUIRED IMPORTED_TARGET icu-uc)
pkg_check_modules(SODIUM REQUIRED IMPORTED_TARGET libsodium)
pkg_check_modules(XXHASH REQUIRED IMPORTED_TARGET libxxhash)
pkg_check_modules(URING REQUIRED IMPORTED_TARGET liburing)
pkg_check_modules(NUMA REQUIRED IMPORTED_TARGET numa)
pkg_check_modules(HWY REQUIRED IMPORTED_TARGET libhwy)

set(MPI_CXX_SKIP_MPICXX ON)
find_package(MPI REQUIRED COMPONENTS CXX)  # MPI::MPI_CXX

if(FORETOKEN_TESTS)
  find_package(GTest REQUIRED)            # GTest::gmock_main
  include(GoogleTest)
endif()
