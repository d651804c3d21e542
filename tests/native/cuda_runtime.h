// Found instead of CUDA's own header of this name.
#pragma once

#include "cuda_on_cpu.h"
