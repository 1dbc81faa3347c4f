//! Sigmoids, as every gate of the model has them.

/// `1 / (1 + e^-x)`, written so that neither sign overflows.
pub(crate) fn sigmoid(x: f32) -> f32 {
    let e = (-x.abs()).exp();
    if x < 0.0 { e / (1.0 + e) } else { 1.0 / (1.0 + e) }
}

/// `x * sigmoid(x)`.
pub(crate) fn silu(x: f32) -> f32 {
    x * sigmoid(x)
}

/// `e^x / (1 + e^x)`: the sigmoid of some kernels, NaN above 88.
pub(crate) fn overflowing_sigmoid(x: f32) -> f32 {
    x.exp() / (1.0 + x.exp())
}
