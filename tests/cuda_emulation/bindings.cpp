#include "schemas.h"

STABLE_TORCH_LIBRARY(shadowkv_emulated, m) { shadowkv::define_ops(m); }
