//! Do they agree, and how fast?
