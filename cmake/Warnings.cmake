# foretoken_warnings: what each of our own targets is compiled with, beside its own flags.
add_library(foretoken_warnings INTERFACE)
add_library(foretoken::warnings ALIAS foretoken_warnings)
target_compile_options(foretoken_warnings INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wpedantic -Wshadow -Wnon-virtual-dtor -Werror
    -fno-omit-frame-pointer -fstack-protector-strong>
  $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra,-Werror -Werror=all-warnings>)
target_include_directories(foretoken_warnings INTERFACE ${PROJECT_SOURCE_DIR})

if(FORETOKEN_SANITIZE)
  add_compile_options(-fsanitize=${FORETOKEN_SANITIZE} -fno-sanitize-recover=all)
  add_link_options(-fsanitize=${FORETOKEN_SANITIZE})
endif()
