//! An index: every file it names is inside the folder.
#![no_main]

use golden::{checkpoint::parse_index, file::is_plain_name};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    for (tensor, file) in parse_index(text).unwrap_or_default() {
        assert!(is_plain_name(&file), "{tensor}: {file}");
    }
});
