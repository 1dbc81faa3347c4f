//! A manifest of a recording, and the question that it answers.
#![no_main]

use golden::recording::{Manifest, Question};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let _ = Manifest::parse(text);
    if let Ok(value) = text.parse::<serde_json::Value>() {
        let _ = serde_json::from_value::<Question>(value);
    }
});
