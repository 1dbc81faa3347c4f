//! The command line as a stranger meets it: the built program, its two streams, its files, its exit
//! codes.
//!
//! What holds of every run is asserted in [`Home::run`], so that no test can forget it: an exit code
//! of the closed set, never a panic, one JSON object per line that the published schema describes, and
//! a verdict that says the same.

mod cli {
    mod bisect;
    mod check;
    mod compare;
    mod config;
    mod contract;
    mod formats;
    mod gate;
    pub(crate) mod home;
    mod model;
    mod ops;
    mod paths;
    mod recordings;
    mod reports;
    mod results;
    mod scale;
    mod workflows;
}
