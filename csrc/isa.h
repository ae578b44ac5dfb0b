// Choice of instruction set at run time.
#pragma once

enum class Isa { portable, avx2, avx512 };

// The best set that this build holds and this processor has; AVF_CPU_ISA=avx512|avx2|portable asks for a lower one.
Isa isa();
