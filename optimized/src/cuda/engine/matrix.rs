//! What is stored how: activations, and weight matrices.

use crate::cuda::device::Buffer;

/// What activations are stored in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::cuda) enum Element {
    F32,
    Bf16,
}

impl Element {
    pub(in crate::cuda) fn size(self) -> usize {
        match self {
            Element::F32 => 4,
            Element::Bf16 => 2,
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Element::F32 => "f32",
            Element::Bf16 => "bf16",
        }
    }
}

/// What weights are stored in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::cuda) enum Stored {
    F32,
    Bf16,
    F16,
    Fp8,
}

impl Stored {
    pub(in crate::cuda) fn size(self) -> usize {
        match self {
            Stored::F32 => 4,
            Stored::Bf16 | Stored::F16 => 2,
            Stored::Fp8 => 1,
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Stored::F32 => "f32",
            Stored::Bf16 => "bf16",
            Stored::F16 => "f16",
            Stored::Fp8 => "Fp8",
        }
    }
}

/// Weight matrices of one shape, one after another.
pub(in crate::cuda) struct Matrix {
    pub(in crate::cuda) weights: Buffer,
    /// Of FP8, one of each block.
    pub(in crate::cuda) scales: Option<Buffer>,
    pub(in crate::cuda) stored: Stored,
    pub(in crate::cuda) rows: usize,
    pub(in crate::cuda) columns: usize,
    pub(in crate::cuda) block: [usize; 2],
}

impl Matrix {
    /// Bytes on the device.
    pub(in crate::cuda) fn bytes(&self) -> usize {
        self.weights.len() + self.scales.as_ref().map_or(0, Buffer::len)
    }

    /// Numbers of all of them.
    pub(in crate::cuda) fn elements(&self) -> usize {
        self.weights.len() / self.stored.size()
    }

    /// Some rows of one matrix, whole blocks of them; they are there as long as it is.
    pub(in crate::cuda) fn rows_of(&self, first: usize, rows: usize) -> Matrix {
        let part = |buffer: &Buffer, one: usize| {
            let [from, end] = [first, first + rows].map(|row| row.div_ceil(one) * one);
            let bytes = buffer.len() / self.rows.div_ceil(one);
            buffer.part(from / one * bytes, (end - from) / one * bytes)
        };
        let scales = self.scales.as_ref().map(|scales| part(scales, self.block[0]));
        Matrix { weights: part(&self.weights, 1), scales, rows, ..*self }
    }

    /// Whether another one can stand among these.
    pub(in crate::cuda) fn alike(&self, other: &Matrix) -> bool {
        let kind = |one: &Matrix| (one.stored, one.rows, one.columns, one.block);
        kind(self) == kind(other)
    }

    /// Some of `all` matrices, which are there as long as these are.
    pub(in crate::cuda) fn some(&self, first: usize, count: usize, all: usize) -> Matrix {
        let part = |buffer: &Buffer| {
            let one = buffer.len() / all;
            buffer.part(first * one, count * one)
        };
        let (weights, scales) = (part(&self.weights), self.scales.as_ref().map(part));
        Matrix { weights, scales, ..*self }
    }
}
