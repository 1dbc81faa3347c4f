//! Intermediates of a step, told as they are computed, and others put in their place.

use std::borrow::Cow;

use golden::{
    Error,
    engine::Routing,
    tap::{Forced, Part, Tap, Value, name},
};
use half::bf16;
use ndarray::{Array2, ArrayD};
use zerocopy::IntoBytes;

use crate::cuda::{
    device::{Buffer, Device},
    engine::Element,
};

/// What looks at a step.
pub(super) struct Seen<'a> {
    /// Where the ops stand that are looked at.
    pub(super) part: Part,
    pub(super) told: Option<Vec<Tap>>,
    pub(super) forced: Option<&'a Forced>,
}

/// What is wanted of the way through the layers.
pub(super) struct Looked<'a> {
    pub(super) seen: Seen<'a>,
    pub(super) hidden: Option<Vec<Array2<f32>>>,
    pub(super) routing: Option<Vec<Option<Routing>>>,
    pub(super) forced_routing: Option<&'a [Option<Array2<i64>>]>,
    /// Whether somebody is told of layers as they come.
    pub(super) listens: bool,
}

impl Looked<'_> {
    /// Nobody looks.
    pub(super) fn nothing() -> Looked<'static> {
        Looked {
            seen: Seen { part: Part::Embedding, told: None, forced: None },
            hidden: None,
            routing: None,
            forced_routing: None,
            listens: false,
        }
    }
}

/// Numbers of the device.
pub(super) fn numbers(
    device: &Device,
    from: &Buffer,
    element: Element,
    n: usize,
) -> Result<Vec<f32>, Error> {
    match element {
        Element::F32 => {
            let mut wide = vec![0.0; n];
            device.get(from, wide.as_mut_bytes())?;
            Ok(wide)
        }
        Element::Bf16 => {
            let mut narrow = vec![0_u16; n];
            device.get(from, narrow.as_mut_bytes())?;
            Ok(narrow.into_iter().map(|bits| bf16::from_bits(bits).to_f32()).collect())
        }
    }
}

/// Numbers as a buffer of the device has them.
pub(super) fn stored(x: &[f32], element: Element) -> Cow<'_, [u8]> {
    match element {
        Element::F32 => x.as_bytes().into(),
        Element::Bf16 => {
            let narrow: Vec<bf16> = x.iter().map(|&x| bf16::from_f32(x)).collect();
            narrow.as_bytes().to_vec().into()
        }
    }
}

/// Ids of experts on the device.
pub(super) fn put_ids(
    device: &Device,
    ids: &Array2<i64>,
    shape: (usize, usize),
) -> Result<Buffer, Error> {
    if ids.dim() != shape {
        return Err(format!("experts are forced of {:?}, of {shape:?}", ids.dim()).into());
    }
    let ids: Vec<i64> = ids.iter().copied().collect();
    let mut to = device.room(8 * ids.len())?;
    device.put_at(ids.as_bytes(), &mut to, 0)?;
    device.wait()?;
    Ok(to)
}

impl Seen<'_> {
    /// Whether anybody looks: what is fused otherwise is then computed piece by piece.
    pub(super) fn looks(&self) -> bool {
        self.told.is_some() || self.forced.is_some()
    }

    /// Numbers of an op, in a shape.
    ///
    /// # Errors
    /// If what is forced has another shape.
    pub(super) fn see(
        &mut self,
        device: &Device,
        (op, tensor): (&'static str, &'static str),
        shape: &[usize],
        buffer: &mut Buffer,
        element: Element,
    ) -> Result<(), Error> {
        if !self.looks() {
            return Ok(());
        }
        let n = shape.iter().product();
        let mut here = numbers(device, buffer, element, n)?;
        if self.see_here((op, tensor), shape, &mut here)? {
            device.put_at(&stored(&here, element), buffer, 0)?;
            device.wait()?;
        }
        Ok(())
    }

    /// The same of numbers that are here; whether others were put in their place.
    pub(super) fn see_here(
        &mut self,
        (op, tensor): (&'static str, &'static str),
        shape: &[usize],
        x: &mut [f32],
    ) -> Result<bool, Error> {
        if let Some(told) = &mut self.told {
            let wide = x.iter().map(|&x| f64::from(x)).collect();
            let value = Value::Numbers(ArrayD::from_shape_vec(shape, wide)?);
            told.push(Tap { part: self.part, op: op.into(), tensor: tensor.into(), value });
        }
        let forced = self.forced.and_then(|forced| forced.get(&name(self.part, op, tensor)));
        let Some(Value::Numbers(forced)) = forced else { return Ok(false) };
        if forced.shape() != shape {
            let got = forced.shape();
            return Err(
                format!("{op} {tensor}: forced in shape {got:?}, expected {shape:?}").into()
            );
        }
        x.iter_mut().zip(forced).for_each(|(x, &forced)| *x = forced as f32);
        Ok(true)
    }

    /// Ids that stand in place of an op's own.
    ///
    /// # Errors
    /// If they are no matrix.
    pub(super) fn given_ids(&self, op: &str, tensor: &str) -> Result<Option<Array2<i64>>, Error> {
        match self.forced.and_then(|forced| forced.get(&name(self.part, op, tensor))) {
            Some(Value::Integers(ids)) => Ok(Some(ids.clone().into_dimensionality()?)),
            _ => Ok(None),
        }
    }
}
