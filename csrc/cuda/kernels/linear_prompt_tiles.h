// Tile variants of linear_prompt_hopper.cu, which defines QVL_LINEAR to compile a kernel for each;
// cuda/linear_prompt.cc, the launcher, makes a table of them. Arguments: warpgroups per block that multiply,
// each with 64 rows of W (one more copies); tokens per block; blocks of a cluster along rows of W, and along
// tokens; stages; blocks per multiprocessor.
QVL_LINEAR(1, 32, 1, 1, 8, 2)
QVL_LINEAR(1, 64, 1, 1, 6, 2)
QVL_LINEAR(1, 144, 1, 1, 6, 1)
QVL_LINEAR(1, 144, 2, 1, 6, 1)
QVL_LINEAR(2, 104, 1, 2, 6, 1)
QVL_LINEAR(2, 128, 1, 2, 6, 1)
QVL_LINEAR(2, 256, 2, 1, 4, 1)
QVL_LINEAR(3, 144, 1, 2, 4, 1)
QVL_LINEAR(3, 208, 1, 1, 4, 1)
QVL_LINEAR(3, 208, 2, 1, 4, 1)
QVL_LINEAR(4, 96, 2, 1, 4, 1)
