// unit.cpp runs these.
#pragma once

void test_cuda_ops();
