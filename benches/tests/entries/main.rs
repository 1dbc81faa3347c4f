//! What holds for the entries of the registry. Here, because unit tests that reach the registry compile
//! all of it a second time.

mod bisect;
mod filter;
mod foreign;
mod registry;
mod trace;
