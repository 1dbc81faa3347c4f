//! Looking at intermediates as they are computed, and putting others in their place.

use golden::tap::{Forced, Part, Tap, Value, name};
use ndarray::{ArcArray, Dimension};

use crate::real::Real;

/// What looks at intermediates.
///
/// Each op of a composite shows what it computed before anybody uses it.
#[derive(Debug)]
pub struct Probe<'a> {
    /// Where the ops stand that are looked at.
    pub part: Part,
    told: Option<&'a mut Vec<Tap>>,
    forced: Option<&'a Forced>,
}

impl<'a> Probe<'a> {
    /// Looks at nothing.
    pub fn off() -> Probe<'a> {
        Probe::new(None, None)
    }

    /// Tells `told`, and puts what is `forced` in place of what was told.
    pub fn new(told: Option<&'a mut Vec<Tap>>, forced: Option<&'a Forced>) -> Probe<'a> {
        Probe { part: Part::Alone, told, forced }
    }

    /// Numbers of an op.
    ///
    /// # Panics
    /// If what is forced has another shape.
    pub fn see<R: Real, D: Dimension>(
        &mut self,
        op: &'static str,
        tensor: &'static str,
        x: &mut ArcArray<R, D>,
    ) {
        self.tell(op, tensor, || Value::Numbers(x.map(|x| x.to_f64()).into_dyn()));
        if let Some(Value::Numbers(forced)) = self.forced(op, tensor) {
            assert_eq!(forced.shape(), x.shape(), "{op} {tensor}: forced in another shape");
            x.iter_mut().zip(forced).for_each(|(x, &forced)| *x = R::of(forced));
        }
    }

    /// Ids of an op.
    ///
    /// # Panics
    /// If what is forced has another shape.
    pub fn see_ids<D: Dimension>(
        &mut self,
        op: &'static str,
        tensor: &'static str,
        x: &mut ArcArray<i64, D>,
    ) {
        self.tell(op, tensor, || Value::Integers(x.to_owned().into_dyn()));
        if let Some(Value::Integers(forced)) = self.forced(op, tensor) {
            assert_eq!(forced.shape(), x.shape(), "{op} {tensor}: forced in another shape");
            x.iter_mut().zip(forced).for_each(|(x, &forced)| *x = forced);
        }
    }

    fn tell(&mut self, op: &'static str, tensor: &'static str, value: impl FnOnce() -> Value) {
        let part = self.part;
        if let Some(told) = &mut self.told {
            told.push(Tap { part, op: op.into(), tensor: tensor.into(), value: value() });
        }
    }

    fn forced(&self, op: &str, tensor: &str) -> Option<&'a Value> {
        self.forced?.get(&name(self.part, op, tensor))
    }
}
