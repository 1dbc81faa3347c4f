//! Named tensors: how the inputs and outputs of every op are seen by code that knows no op.

use ndarray::{
    ArcArray, ArcArray1, ArcArray2, ArrayD, ArrayViewD, ArrayViewMutD, Dimension, Ix3, Ix4,
    ShapeBuilder,
};

use crate::recording::Recorded;

/// A vector that is cheap to clone; writing to a shared one copies it.
pub type Tensor1<T> = ArcArray1<T>;
/// A matrix that is cheap to clone.
pub type Tensor2<T> = ArcArray2<T>;
/// A tensor of rank 3 that is cheap to clone.
pub type Tensor3<T> = ArcArray<T, Ix3>;
/// A tensor of rank 4 that is cheap to clone.
pub type Tensor4<T> = ArcArray<T, Ix4>;

/// A read-only view of a tensor of any element type.
#[derive(Clone, Debug)]
pub enum View<'a> {
    /// 32-bit floats.
    F32(ArrayViewD<'a, f32>),
    /// 64-bit floats.
    F64(ArrayViewD<'a, f64>),
    /// Integers.
    I64(ArrayViewD<'a, i64>),
    /// Bytes (fp8 codes).
    U8(ArrayViewD<'a, u8>),
    /// Numbers of an arithmetic of their own, widened.
    Wide(ArrayD<f64>),
}

/// The same, writable.
#[derive(Debug)]
pub enum ViewMut<'a> {
    /// 32-bit floats.
    F32(ArrayViewMutD<'a, f32>),
    /// 64-bit floats.
    F64(ArrayViewMutD<'a, f64>),
    /// Integers.
    I64(ArrayViewMutD<'a, i64>),
    /// Bytes (fp8 codes).
    U8(ArrayViewMutD<'a, u8>),
    /// Numbers of an arithmetic of their own: not writable from outside it.
    Opaque,
}

impl View<'_> {
    /// Sizes, outermost first.
    pub fn shape(&self) -> &[usize] {
        match self {
            View::F32(x) => x.shape(),
            View::F64(x) => x.shape(),
            View::I64(x) => x.shape(),
            View::U8(x) => x.shape(),
            View::Wide(x) => x.shape(),
        }
    }

    /// Every element in row-major order, as `f64`.
    pub fn to_f64(&self) -> Vec<f64> {
        match self {
            View::F32(x) => x.iter().map(|&v| f64::from(v)).collect(),
            View::F64(x) => x.iter().copied().collect(),
            View::I64(x) => x.iter().map(|&v| v as f64).collect(),
            View::U8(x) => x.iter().map(|&v| f64::from(v)).collect(),
            View::Wide(x) => x.iter().copied().collect(),
        }
    }
}

/// What a tensor may hold.
pub trait Element: Copy + std::fmt::Debug + Send + Sync + 'static {
    /// Wraps a view.
    fn view(x: ArrayViewD<'_, Self>) -> View<'_>;
    /// Wraps a writable view.
    fn view_mut(x: ArrayViewMutD<'_, Self>) -> ViewMut<'_>;
    /// From a recorded tensor of this type, or of a narrower one.
    fn recorded(x: Recorded) -> Option<ArrayD<Self>>;
}

macro_rules! element {
    ($kind:ty, $view:ident, $recorded:expr) => {
        impl Element for $kind {
            fn view(x: ArrayViewD<'_, Self>) -> View<'_> {
                View::$view(x)
            }
            fn view_mut(x: ArrayViewMutD<'_, Self>) -> ViewMut<'_> {
                ViewMut::$view(x)
            }
            fn recorded(x: Recorded) -> Option<ArrayD<Self>> {
                ($recorded)(x)
            }
        }
    };
}
element!(f32, F32, |x| if let Recorded::F32(x) = x { Some(x) } else { None });
element!(f64, F64, |x| match x {
    Recorded::F32(x) => Some(x.mapv(f64::from)),
    Recorded::F64(x) => Some(x),
    _ => None,
});
element!(i64, I64, |x| if let Recorded::I64(x) = x { Some(x) } else { None });
element!(u8, U8, |x| if let Recorded::U8(x) = x { Some(x) } else { None });

/// What an output may hold.
pub trait Written: Element {
    /// What an element holds that nobody wrote: NaN, the least integer.
    const UNWRITTEN: Self;
}
impl Written for f32 {
    const UNWRITTEN: f32 = f32::NAN;
}
impl Written for i64 {
    const UNWRITTEN: i64 = i64::MIN;
}

/// A tensor that nobody has written yet.
pub fn unwritten<T: Written, D: Dimension>(shape: impl ShapeBuilder<Dim = D>) -> ArcArray<T, D> {
    ArcArray::from_elem(shape, T::UNWRITTEN)
}

/// Exact widening of one element to the number type of a computation.
pub trait Cast<S> {
    /// `x` in the wider type.
    fn cast(x: S) -> Self;
}

impl Cast<f32> for f32 {
    fn cast(x: f32) -> f32 {
        x
    }
}
impl Cast<f32> for f64 {
    fn cast(x: f32) -> f64 {
        f64::from(x)
    }
}
impl Cast<i64> for i64 {
    fn cast(x: i64) -> i64 {
        x
    }
}
impl Cast<u8> for u8 {
    fn cast(x: u8) -> u8 {
        x
    }
}

/// A number in which an op can be computed: activations and outputs are of this type.
pub trait Number: Element + Cast<f32> {}
impl Number for f32 {}
impl Number for f64 {}

/// Named read-only and writable views, in declaration order; scalars are not listed.
pub trait Tensors {
    /// Names of all fields, scalars too.
    fn names() -> &'static [&'static str]
    where
        Self: Sized;
    /// Every tensor with its name.
    fn tensors(&self) -> Vec<(&'static str, View<'_>)>;
    /// The same, writable.
    fn tensors_mut(&mut self) -> Vec<(&'static str, ViewMut<'_>)>;
    /// Every scalar with its name.
    fn scalars(&self) -> Vec<(&'static str, f64)>;
}

/// A field of a struct made by [`tensors!`](crate::tensors), as seen by name.
pub trait Field {
    /// Appends the view, if the field is a tensor.
    fn push<'a>(&'a self, _name: &'static str, _to: &mut Vec<(&'static str, View<'a>)>) {}
    /// Appends the writable view, if the field is a tensor.
    fn push_mut<'a>(&'a mut self, _name: &'static str, _to: &mut Vec<(&'static str, ViewMut<'a>)>) {
    }
    /// Its value, if the field is a scalar.
    fn scalar(&self) -> Option<f64> {
        None
    }
}

/// Named tensors and scalars that a struct made by [`tensors!`](crate::tensors) can be read from.
pub trait Source {
    /// A tensor.
    fn tensor(&self, name: &str) -> Option<Recorded>;
    /// A scalar.
    fn scalar(&self, name: &str) -> Option<f64>;
}

/// A struct made by [`tensors!`](crate::tensors), read by name.
pub trait Read: Sized {
    /// Every field.
    ///
    /// # Errors
    /// Names the first field that is missing or of another type or rank.
    fn read(source: &dyn Source) -> Result<Self, String>;
}

/// A field read by name.
pub trait ReadField: Sized {
    /// The field called `name`.
    ///
    /// # Errors
    /// If it is missing, or of another type or rank.
    fn read_field(name: &str, source: &dyn Source) -> Result<Self, String>;
}

impl<T: Element, D: Dimension> ReadField for ArcArray<T, D> {
    fn read_field(name: &str, source: &dyn Source) -> Result<Self, String> {
        let x = source.tensor(name).ok_or_else(|| format!("tensor {name}: missing"))?;
        let x = T::recorded(x).ok_or_else(|| format!("tensor {name}: of another type"))?;
        let shape = x.shape().to_vec();
        let x = x
            .into_dimensionality::<D>()
            .map_err(|_| format!("tensor {name}: rank of {shape:?}"))?;
        Ok(x.into_shared())
    }
}

impl<T: ReadField> ReadField for Option<T> {
    fn read_field(name: &str, source: &dyn Source) -> Result<Self, String> {
        if source.tensor(name).is_none() { Ok(None) } else { T::read_field(name, source).map(Some) }
    }
}

/// A field made from the same field of the `f32` struct.
pub trait Lift<S> {
    /// The same values in another number type, exactly.
    fn lift(from: &S) -> Self;
}

impl<T: Element, D: Dimension> Field for ArcArray<T, D> {
    fn push<'a>(&'a self, name: &'static str, to: &mut Vec<(&'static str, View<'a>)>) {
        to.push((name, T::view(self.view().into_dyn())));
    }
    fn push_mut<'a>(&'a mut self, name: &'static str, to: &mut Vec<(&'static str, ViewMut<'a>)>) {
        to.push((name, T::view_mut(self.view_mut().into_dyn())));
    }
}

impl<S: Element, T: Element + Cast<S>, D: Dimension> Lift<ArcArray<S, D>> for ArcArray<T, D> {
    fn lift(from: &ArcArray<S, D>) -> Self {
        from.map(|&x| T::cast(x)).into_shared()
    }
}

impl<T: Field> Field for Option<T> {
    fn push<'a>(&'a self, name: &'static str, to: &mut Vec<(&'static str, View<'a>)>) {
        if let Some(x) = self {
            x.push(name, to);
        }
    }
    fn push_mut<'a>(&'a mut self, name: &'static str, to: &mut Vec<(&'static str, ViewMut<'a>)>) {
        if let Some(x) = self {
            x.push_mut(name, to);
        }
    }
}

impl<S, T: Lift<S>> Lift<Option<S>> for Option<T> {
    fn lift(from: &Option<S>) -> Self {
        from.as_ref().map(T::lift)
    }
}

macro_rules! scalar {
    ($($kind:ty: $from:expr, $to:expr;)*) => {$(
        impl ReadField for $kind {
            fn read_field(name: &str, source: &dyn Source) -> Result<Self, String> {
                let from: fn(f64) -> $kind = $from;
                source.scalar(name).map(from).ok_or_else(|| format!("scalar {name}: missing"))
            }
        }
        impl Field for $kind {
            fn scalar(&self) -> Option<f64> {
                let to: fn($kind) -> f64 = $to;
                Some(to(*self))
            }
        }
        impl Lift<$kind> for $kind {
            fn lift(from: &Self) -> Self {
                *from
            }
        }
    )*};
}
scalar! {
    f64: |x| x, |x| x;
    usize: |x| x as usize, |x| x as f64;
    u64: |x| x as u64, |x| x as f64;
    bool: |x| x != 0.0, f64::from;
}
