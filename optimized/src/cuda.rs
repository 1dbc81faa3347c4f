//! Answers on a GPU. The compiler and the driver are found at run time, or not.

pub(crate) mod device;
