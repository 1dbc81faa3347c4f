//! Intermediates of a step, told as they are computed, and others put in their place.

use golden::{
    Error,
    tap::{Forced, Part, Tap, Value, name},
};
use ndarray::{Array2, ArrayD};

/// What looks at a step.
pub(crate) struct Seen<'a> {
    /// Where the ops stand that are looked at.
    pub(crate) part: Part,
    pub(crate) told: Option<Vec<Tap>>,
    pub(crate) forced: Option<&'a Forced>,
}

impl Seen<'_> {
    /// Whether anybody looks: what is fused otherwise is then computed piece by piece.
    pub(crate) fn looks(&self) -> bool {
        self.told.is_some() || self.forced.is_some()
    }

    /// Numbers of an op, in a shape.
    ///
    /// # Errors
    /// If what is forced has another shape.
    pub(crate) fn see(
        &mut self,
        op: &'static str,
        tensor: &'static str,
        shape: &[usize],
        x: &mut [f32],
    ) -> Result<(), Error> {
        if let Some(told) = &mut self.told {
            let wide = x.iter().map(|&x| f64::from(x)).collect();
            let value = Value::Numbers(ArrayD::from_shape_vec(shape, wide)?);
            told.push(Tap { part: self.part, op: op.into(), tensor: tensor.into(), value });
        }
        let forced = self.forced.and_then(|forced| forced.get(&name(self.part, op, tensor)));
        if let Some(Value::Numbers(forced)) = forced {
            if forced.shape() != shape {
                let got = forced.shape();
                return Err(
                    format!("{op} {tensor}: forced in shape {got:?}, expected {shape:?}").into()
                );
            }
            x.iter_mut().zip(forced).for_each(|(x, &forced)| *x = forced as f32);
        }
        Ok(())
    }

    /// Ids that stand in place of an op's own.
    ///
    /// # Errors
    /// If they are no matrix.
    pub(crate) fn given_ids(&self, op: &str, tensor: &str) -> Result<Option<Array2<i64>>, Error> {
        match self.forced.and_then(|forced| forced.get(&name(self.part, op, tensor))) {
            Some(Value::Integers(ids)) => Ok(Some(ids.clone().into_dimensionality()?)),
            _ => Ok(None),
        }
    }
}
