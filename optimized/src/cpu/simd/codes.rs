//! FP8 codes as numbers.

use half::bf16;

use super::{PAIRS, QUADS};

/// The bytes of 128 bf16 numbers, high ones and low ones: whole lines of memory.
#[repr(C, align(64))]
pub(crate) struct Table(pub(crate) [u8; 128], pub(crate) [u8; 128]);

/// The bf16 number of each FP8 code without its sign.
pub(crate) static FP8: Table = fp8_bytes();

const fn fp8_bytes() -> Table {
    let (mut high, mut low) = ([0; 128], [0; 128]);
    let mut code = 0;
    while code < 128 {
        let (mut exponent, mut mantissa) = (code >> 3, code & 7);
        let bits = if code == 127 {
            0x7fc0
        } else if exponent == 0 && mantissa == 0 {
            0
        } else {
            // Below the smallest normal the hidden one is further down; bf16 has room to write it.
            if exponent == 0 {
                exponent = 1;
                while mantissa < 8 {
                    mantissa *= 2;
                    exponent -= 1;
                }
                mantissa -= 8;
            }
            ((exponent + 120) << 7) | (mantissa << 4)
        };
        (high[code as usize], low[code as usize]) = ((bits >> 8) as u8, bits as u8);
        code += 1;
    }
    Table(high, low)
}

/// The number of each FP8 code.
pub(crate) static FP8_WIDE: [f32; 256] = {
    let (mut numbers, mut code) = ([0.0; 256], 0);
    while code < 256 {
        let (high, low) = (FP8.0[code & 127] as u32, FP8.1[code & 127] as u32);
        numbers[code] = f32::from_bits(((code as u32 & 128) | high) << 24 | low << 16);
        code += 1;
    }
    numbers
};

/// The bf16 numbers of FP8 codes, by the table.
#[inline(always)]
pub(crate) fn fp8_by_table(codes: &[u8; QUADS]) -> [[bf16; PAIRS]; 2] {
    let number = |code: u8| {
        let at = usize::from(code & 127);
        bf16::from_bits(u16::from_be_bytes([FP8.0[at] | (code & 128), FP8.1[at]]))
    };
    std::array::from_fn(|half| std::array::from_fn(|i| number(codes[half * PAIRS + i])))
}
