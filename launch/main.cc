// foretoken: the user's one command. See `foretoken --help`.
#include "launch/internal/cli.h"

int main(int argc, char** argv) { return foretoken::launch::run(argc, argv); }
