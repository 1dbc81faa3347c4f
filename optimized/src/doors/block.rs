//! Tensors as foreign code sees them: bytes of a storage type between guard bands.

use golden::{Dtype, View, recording::Recorded};
use half::{bf16, f16};
use ndarray::ArrayD;

/// Name, type and sizes of a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    pub(crate) name: &'static str,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
}

impl Layout {
    /// Bytes of all elements.
    pub(crate) fn size(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.size()
    }
}

/// Bytes of a guard band on either side, at least and at most: in between it is as long as its tensor,
/// so that an index that is off by a row, a head or a whole sequence still lands there.
const GUARD: (usize, usize) = (64 << 10, 1 << 20);
/// Where tensors start: at multiples of this.
const ALIGN: usize = 64;
/// What guard bands hold: NaN in every floating-point type, so that reading there shows as well.
const BAND: [u8; 2] = [0xfd, 0xff];

/// A tensor between guard bands. It never moves.
#[derive(Debug)]
pub(crate) struct Block {
    pub(crate) layout: Layout,
    bytes: Vec<u8>,
    start: usize,
}

impl Block {
    /// Room for a tensor; what it holds is poison.
    pub(crate) fn new(layout: Layout) -> Block {
        let size = layout.size();
        let guard = size.clamp(GUARD.0, GUARD.1);
        let mut bytes = BAND.repeat((size + 2 * guard + ALIGN).div_ceil(2));
        let start = guard + bytes.as_ptr().wrapping_add(guard).align_offset(ALIGN);
        bytes.truncate(start + size + guard);
        let mut block = Block { layout, bytes, start };
        block.poison();
        block
    }

    /// The tensor's bytes.
    pub(crate) fn data(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.layout.size()]
    }

    /// The same, writable.
    pub(crate) fn data_mut(&mut self) -> &mut [u8] {
        let size = self.layout.size();
        &mut self.bytes[self.start..self.start + size]
    }

    /// Everything, guard bands too, and where the tensor starts.
    pub(crate) fn image(&self) -> (&[u8], usize) {
        (&self.bytes, self.start)
    }

    /// The same, writable.
    pub(crate) fn image_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }

    /// Fills the tensor with what an element holds that nobody wrote.
    pub(crate) fn poison(&mut self) {
        let element: &[u8] = match self.layout.dtype {
            Dtype::F64 => &f64::NAN.to_le_bytes(),
            Dtype::F32 => &f32::NAN.to_le_bytes(),
            Dtype::F16 => &f16::NAN.to_le_bytes(),
            Dtype::Bf16 => &bf16::NAN.to_le_bytes(),
            Dtype::I64 => &i64::MIN.to_le_bytes(),
            Dtype::Fp8 | Dtype::U8 => &[0xff],
        };
        for to in self.data_mut().chunks_exact_mut(element.len()) {
            to.copy_from_slice(element);
        }
    }

    /// Stores the elements of a tensor of the same sizes.
    pub(crate) fn store(&mut self, view: &View<'_>) {
        let dtype = self.layout.dtype;
        let to = self.data_mut();
        match (view, dtype) {
            (View::F32(x), Dtype::F16) => {
                fill(to, x.iter().map(|&x| f16::from_f32(x).to_le_bytes()));
            }
            (View::F32(x), Dtype::Bf16) => {
                fill(to, x.iter().map(|&x| bf16::from_f32(x).to_le_bytes()));
            }
            (View::F32(x), _) => fill(to, x.iter().map(|x| x.to_le_bytes())),
            (View::I64(x), _) => fill(to, x.iter().map(|x| x.to_le_bytes())),
            (View::U8(x), _) => fill(to, x.iter().map(|&x| [x])),
            // No op has inputs of other types.
            (View::F64(x), _) => fill(to, x.iter().map(|x| x.to_le_bytes())),
            (View::Wide(_), _) => {}
        }
    }

    /// The elements, widened to f32 where they are narrower.
    pub(crate) fn read(&self) -> Option<Recorded> {
        let (shape, data) = (self.layout.shape.clone(), self.data());
        match self.layout.dtype {
            Dtype::F32 => {
                let x = data.as_chunks().0.iter().map(|&x| f32::from_le_bytes(x)).collect();
                ArrayD::from_shape_vec(shape, x).ok().map(Recorded::F32)
            }
            Dtype::F16 => {
                let x =
                    data.as_chunks().0.iter().map(|&x| f16::from_le_bytes(x).to_f32()).collect();
                ArrayD::from_shape_vec(shape, x).ok().map(Recorded::F32)
            }
            Dtype::Bf16 => {
                let x =
                    data.as_chunks().0.iter().map(|&x| bf16::from_le_bytes(x).to_f32()).collect();
                ArrayD::from_shape_vec(shape, x).ok().map(Recorded::F32)
            }
            Dtype::I64 => {
                let x = data.as_chunks().0.iter().map(|&x| i64::from_le_bytes(x)).collect();
                ArrayD::from_shape_vec(shape, x).ok().map(Recorded::I64)
            }
            Dtype::U8 | Dtype::Fp8 => {
                ArrayD::from_shape_vec(shape, data.to_vec()).ok().map(Recorded::U8)
            }
            Dtype::F64 => None,
        }
    }

    /// Where in the guard bands something was written, if anywhere.
    pub(crate) fn strayed(&self) -> Option<String> {
        let clean = |at: usize| self.bytes[at] == BAND[at % 2];
        let end = self.start + self.layout.size();
        let (before, after): (Vec<usize>, Vec<usize>) = (
            (0..self.start).filter(|&at| !clean(at)).collect(),
            (end..self.bytes.len()).filter(|&at| !clean(at)).collect(),
        );
        let name = self.layout.name;
        match (before.last(), after.first()) {
            (_, Some(&first)) => Some(format!(
                "{} bytes after {name} were written, the first {} beyond its end",
                after.len(),
                first - end
            )),
            (Some(&last), None) => Some(format!(
                "{} bytes before {name} were written, the last {} ahead of its start",
                before.len(),
                self.start - last
            )),
            (None, None) => None,
        }
    }
}

fn fill<const N: usize>(to: &mut [u8], from: impl Iterator<Item = [u8; N]>) {
    for (to, from) in to.as_chunks_mut::<N>().0.iter_mut().zip(from) {
        *to = from;
    }
}

#[cfg(test)]
mod tests {
    use golden::{Dtype, View, recording::Recorded};
    use ndarray::arr1;

    use super::{Block, Layout};

    fn block(dtype: Dtype, n: usize) -> Block {
        Block::new(Layout { name: "x", dtype, shape: vec![n] })
    }

    #[test]
    fn what_is_stored_comes_back_rounded() {
        let x = arr1(&[1.0_f32, -2.5, 1.0 + 1e-6]).into_dyn();
        for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
            let mut block = block(dtype, 3);
            block.store(&View::F32(x.view()));
            let Some(Recorded::F32(got)) = block.read() else { panic!("floats") };
            assert_eq!(got, x.mapv(|x| dtype.round(x)));
            assert_eq!(block.strayed(), None);
            block.poison();
            let Some(Recorded::F32(got)) = block.read() else { panic!("floats") };
            assert!(got.iter().all(|x| x.is_nan()));
        }
    }

    #[test]
    fn strayed_writes_are_found_at_any_size() {
        for n in [0, 1, 5, 64, 1000] {
            let mut block = block(Dtype::F32, n);
            let (image, start) = block.image();
            assert_eq!((image.as_ptr() as usize + start) % 64, 0);
            assert_eq!(image.len(), start + 4 * n + (64 << 10));
            block.image_mut()[start + 4 * n + 7] ^= 1;
            let want = "1 bytes after x were written, the first 7 beyond its end";
            assert_eq!(block.strayed().as_deref(), Some(want));
            block.image_mut()[start + 4 * n + 7] ^= 1;
            block.image_mut()[start - 1] = 0;
            let want = "1 bytes before x were written, the last 1 ahead of its start";
            assert_eq!(block.strayed().as_deref(), Some(want));
        }
    }

    #[test]
    fn a_guard_is_as_long_as_its_tensor() {
        for (n, guard) in [(1, 64 << 10), (50_000, 200_000), (300_000, 1 << 20)] {
            let mut block = block(Dtype::F32, n);
            let start = block.image().1;
            let last = start + 4 * n + guard - 1;
            assert_eq!(block.image().0.len(), last + 1);
            assert!(guard <= start);
            block.image_mut()[last] = 0;
            let want =
                format!("1 bytes after x were written, the first {} beyond its end", guard - 1);
            assert_eq!(block.strayed(), Some(want));
        }
    }
}
