//! What is the answer, fast?
