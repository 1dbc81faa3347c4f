//! May it pass? The command line.

fn main() {}
