//! The codes of `float8_e4m3fn`: sign, 4 exponent bits (bias 7), 3 mantissa bits, no infinities,
//! NaN is `s.1111.111`, largest value 448.

/// The value of a code, exactly.
pub fn to_f32(code: u8) -> f32 {
    let sign = if code & 0x80 == 0 { 1.0 } else { -1.0 };
    let (exponent, mantissa) = (i32::from(code >> 3 & 0xf), f32::from(code & 7));
    if code & 0x7f == 0x7f {
        return f32::NAN;
    }
    // Subnormals have no hidden one and the exponent of the smallest normal.
    let (value, exponent) =
        if exponent == 0 { (mantissa / 8.0, -6) } else { (1.0 + mantissa / 8.0, exponent - 7) };
    sign * value * 2.0_f32.powi(exponent)
}

/// The nearest code, ties to the even mantissa; magnitudes above 448 saturate, NaN stays NaN.
pub fn from_f32(x: f32) -> u8 {
    let sign = if x.is_sign_negative() { 0x80 } else { 0 };
    if x.is_nan() {
        return sign | 0x7f;
    }
    let magnitude = x.abs();
    if magnitude >= 448.0 {
        return sign | 0x7e;
    }
    // In units of the last place of the binade (never below that of the subnormals), exact in f32.
    let exponent = ((magnitude.to_bits() >> 23) as i32 - 127).max(-6);
    let units = (magnitude * 2.0_f32.powi(3 - exponent)).round_ties_even() as u8;
    // `units` is 0..=16; 8..=15 are normal, 16 carries into the next binade.
    sign | ((((exponent + 6) as u8) << 3) + units)
}

#[cfg(test)]
mod tests {
    use super::{from_f32, to_f32};

    #[test]
    fn every_code_survives_the_round_trip() {
        for code in 0..=255_u8 {
            let value = to_f32(code);
            if value.is_nan() {
                assert_eq!(code & 0x7f, 0x7f);
            } else {
                assert_eq!(from_f32(value), code, "{value}");
            }
        }
    }

    #[test]
    fn halfway_values_go_to_the_even_code() {
        for low in (0..0x7e_u8).filter(|c| c + 1 < 0x7f) {
            let middle = f32::midpoint(to_f32(low), to_f32(low + 1));
            let even = if low % 2 == 0 { low } else { low + 1 };
            assert_eq!(from_f32(middle), even, "{middle}");
            assert_eq!(from_f32(middle * (1.0 - 1e-6)), low);
            assert_eq!(from_f32(middle * (1.0 + 1e-6)), low + 1);
        }
        assert_eq!(to_f32(from_f32(1e9)), 448.0);
        assert_eq!(to_f32(from_f32(-1e9)), -448.0);
    }
}
