use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// How a product's sum over what it contracts is rounded.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
#[serde(into = "String", try_from = "String")]
pub enum Sums {
    /// To the nearest, every addition: what processors and the plain cores of a GPU do.
    #[default]
    Nearest,
    /// As tensor cores do: so many products are added to the sum at once, every addend cut two bits below
    /// the last of the largest one's, and the result cut towards zero. Every step loses on the same side,
    /// so that long sums are too small by more than chance.
    /// Source: Fasi, Higham, Mikaitis, Pranesh, Numerical behavior of NVIDIA tensor cores, `PeerJ` Computer
    /// Science 7:e330 (2021); the two bits as measured on an H200 (TRAPS).
    Truncated(usize),
    /// As the FP8 tensor cores of Hopper do (`wgmma`), of products of codes ([`Activations::Fp8`](super::Activations));
    /// all others to the nearest. 32 products are added to the sum at once: every addend is cut below the 13th
    /// bit after the first of the largest, that of a product being where the exponents of its factors add up
    /// to, and the result is cut to 13 bits after its first. As measured on an H200, to the bit (TRAPS); `mma`
    /// has other bits there.
    Fp22,
}

impl fmt::Display for Sums {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Sums::Nearest => f.write_str("nearest"),
            Sums::Truncated(products) => write!(f, "truncated {products}"),
            Sums::Fp22 => f.write_str("fp22"),
        }
    }
}

impl FromStr for Sums {
    type Err = String;

    fn from_str(s: &str) -> Result<Sums, String> {
        let products = s.strip_prefix("truncated ").and_then(|n| n.parse().ok());
        match (s, products) {
            ("nearest", _) => Ok(Sums::Nearest),
            ("fp22", _) => Ok(Sums::Fp22),
            (_, Some(products)) if (1..=256).contains(&products) => Ok(Sums::Truncated(products)),
            _ => Err(format!(
                "sums {s:?}: expected \"nearest\", \"fp22\" or \"truncated N\", N from 1 to 256"
            )),
        }
    }
}

impl From<Sums> for String {
    fn from(sums: Sums) -> String {
        sums.to_string()
    }
}

impl TryFrom<String> for Sums {
    type Error = String;

    fn try_from(s: String) -> Result<Sums, String> {
        s.parse()
    }
}
