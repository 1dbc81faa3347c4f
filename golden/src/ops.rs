//! One file per op: what it is asked, with which letters, shapes and fills.

pub mod rms_norm;
