//! Answers on a GPU. The compiler and the driver are found at run time, or not.
//!
//! `cuda/naive` is one obvious thread mapping per op, in f32, on any architecture from Ampere on: the
//! reader's kernel, and the second opinion where a fast one is doubted. The text is in `kernels`; here
//! stands how it is launched. Every kernel runs between guard bands; one that traps takes the GPU from
//! this process, and nothing else ([`gpu`]).

pub mod attention;
pub mod causal_conv1d;
mod cubin;
pub(crate) mod device;
pub mod embedding;
mod engine;
mod entry;
pub(crate) mod events;
pub mod fp8_dequant;
pub mod gated_delta_rule;
pub mod gdn_gates;
mod gpu;
mod hopper;
mod kernel;
pub mod l2_norm;
mod launch;
pub mod linear;
pub mod lm_head;
pub mod model;
pub mod moe_experts;
pub mod moe_router;
mod narrow;
mod nccl;
pub mod peak;
mod peers;
pub(crate) mod place;
pub mod rms_norm;
pub mod rms_norm_gated;
pub mod roof;
pub mod rope;
pub mod sampling;
pub mod shared_expert;

pub use cubin::{Used, keep_in, resources};
pub use gpu::{Gpu, Trapped, gpu, several};

use std::path::Path;

/// Takes the compiler from a folder, where the system would not find it. Only before any work.
///
/// # Errors
/// If it is not there.
pub fn compiler_in(folder: &Path) -> Result<(), String> {
    device::open_compiler(folder).map_err(|error| error.to_string())
}
