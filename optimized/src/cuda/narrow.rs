//! Weight matrices of few bits, as `common/weight.cuh` reads them: codes, and scales that bf16 has.

use golden::{
    Narrow, fp8,
    narrow::{
        BLOCK, Ends, FP8_BLOCK, fp8_code, fp8_scales, int4_code, int4_ends, int8_code, int8_scale,
    },
};

/// Codes and scales of matrices of `rows` rows of `d` columns, one after another.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Codes {
    pub(super) codes: Vec<u8>,
    pub(super) scales: Vec<f32>,
}

impl Codes {
    /// Of weights that are such numbers already.
    pub(super) fn new(weights: &[f32], rows: usize, d: usize, narrow: Narrow) -> Codes {
        let mut all = Codes::default();
        for matrix in weights.chunks(rows * d) {
            all.push(matrix, d, narrow);
        }
        all
    }

    fn push(&mut self, matrix: &[f32], d: usize, narrow: Narrow) {
        match narrow {
            Narrow::Fp8 => {
                for rows in matrix.chunks(FP8_BLOCK * d) {
                    let scales = fp8_scales(rows, d);
                    let code = |(j, &w): (usize, &f32)| fp8_code(w, scales[j / FP8_BLOCK]);
                    self.codes
                        .extend(rows.chunks(d).flat_map(|row| row.iter().enumerate().map(code)));
                    self.scales.extend(&scales);
                }
            }
            Narrow::Int8 => {
                for block in matrix.chunks(d).flat_map(|row| row.chunks(BLOCK)) {
                    let scale = int8_scale(block);
                    self.codes.extend(block.iter().map(|&w| int8_code(w, scale).cast_unsigned()));
                    self.scales.push(scale);
                }
            }
            Narrow::Int4 => {
                for block in matrix.chunks(d).flat_map(|row| row.chunks(BLOCK)) {
                    let ends = int4_ends(block);
                    let code = |pair: &[f32]| {
                        let of = |at: usize| pair.get(at).map_or(0, |&w| int4_code(w, ends));
                        of(0) | of(1) << 4
                    };
                    self.codes.extend(block.chunks(2).map(code));
                    self.scales.extend([ends.minimum, ends.scale]);
                }
            }
        }
    }

    /// The weights.
    pub(super) fn weights(&self, rows: usize, d: usize, narrow: Narrow) -> Vec<f32> {
        let (own, blocks) = (FP8_BLOCK, d.div_ceil(BLOCK));
        let at = |i: usize| {
            let (matrix, row, column) = (i / (rows * d), i / d % rows, i % d);
            match narrow {
                Narrow::Fp8 => {
                    let row = matrix * rows.div_ceil(own) + row / own;
                    fp8::to_f32(self.codes[i]) * self.scales[row * d.div_ceil(own) + column / own]
                }
                Narrow::Int8 => {
                    let scale = self.scales[i / d * blocks + column / BLOCK];
                    f32::from(self.codes[i].cast_signed()) * scale
                }
                Narrow::Int4 => {
                    let both = self.codes[i / d * d.div_ceil(2) + column / 2];
                    let block = 2 * (i / d * blocks + column / BLOCK);
                    let (minimum, scale) = (self.scales[block], self.scales[block + 1]);
                    Ends { minimum, scale }.of(if column % 2 == 0 { both & 15 } else { both >> 4 })
                }
            }
        };
        let matrices = match narrow {
            Narrow::Fp8 | Narrow::Int8 => self.codes.len() / (rows * d),
            Narrow::Int4 => self.codes.len() / (rows * d.div_ceil(2)),
        };
        (0..matrices * rows * d).map(at).collect()
    }
}

#[cfg(test)]
mod tests {
    use golden::{Dtype, Narrow, Rng};

    use super::Codes;

    #[test]
    fn what_is_narrowed_comes_back() {
        for (seed, (n, rows, d)) in
            [(1, 1, 1), (2, 3, 33), (3, 130, 129), (1, 5, 300)].into_iter().enumerate()
        {
            let drawn = Rng::keyed("codes", seed as u64).normals((n * rows, d), 0.0, 0.1);
            for narrow in Narrow::ALL {
                let mut weights: Vec<f32> = drawn.iter().copied().collect();
                weights.chunks_mut(rows * d).for_each(|matrix| narrow.round(matrix, d));
                let codes = Codes::new(&weights, rows, d, narrow);
                assert_eq!(codes.weights(rows, d, narrow), weights, "{narrow} {n} {rows} {d}");
                assert!(codes.scales.iter().all(|&scale| Dtype::Bf16.round(scale) == scale));
                let bytes = (codes.codes.len() + 2 * codes.scales.len()) as u64;
                assert!(bytes <= n as u64 * narrow.bytes(rows as u64, d as u64), "{narrow}");
            }
        }
    }
}
