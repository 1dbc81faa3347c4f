//! Storage types: what a number may be rounded to before anybody computes with it.

use std::{fmt, str::FromStr};

use half::{bf16, f16};
use serde::{Deserialize, Serialize};

/// The type in which a tensor is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// IEEE binary64.
    F64,
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// The upper half of a binary32.
    Bf16,
    /// FP8 with 4 exponent and 3 mantissa bits, no infinities (`float8_e4m3fn`).
    Fp8,
    /// Signed 64-bit integers (token ids, offsets).
    I64,
    /// Bytes.
    U8,
}

impl Dtype {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Dtype::F64 | Dtype::I64 => 8,
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::Bf16 => 2,
            Dtype::Fp8 | Dtype::U8 => 1,
        }
    }

    /// `x` as this type would store it, widened again: round to nearest, ties to even.
    ///
    /// FP8 saturates at 448, as the official quantiser does.
    pub fn round(self, x: f32) -> f32 {
        match self {
            Dtype::F16 => f16::from_f32(x).to_f32(),
            Dtype::Bf16 => bf16::from_f32(x).to_f32(),
            Dtype::Fp8 => crate::fp8::to_f32(crate::fp8::from_f32(x)),
            Dtype::F64 | Dtype::F32 | Dtype::I64 | Dtype::U8 => x,
        }
    }

    /// The name in a case id: `f32`, `bf16`, …
    pub fn name(self) -> &'static str {
        match self {
            Dtype::F64 => "f64",
            Dtype::F32 => "f32",
            Dtype::F16 => "f16",
            Dtype::Bf16 => "bf16",
            Dtype::Fp8 => "fp8",
            Dtype::I64 => "i64",
            Dtype::U8 => "u8",
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Dtype {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        use Dtype::{Bf16, F16, F32, F64, Fp8, I64, U8};
        let all = [F64, F32, F16, Bf16, Fp8, I64, U8];
        all.into_iter()
            .find(|d| d.name() == s)
            .ok_or_else(|| format!("dtype {s:?}: expected f64, f32, f16, bf16, fp8, i64 or u8"))
    }
}
