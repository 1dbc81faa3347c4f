//! A config: what is accepted can be written and read again.
#![no_main]

use golden::Config;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(config) = Config::parse(text, "config.json") {
        assert_eq!(Config::parse(&config.to_json().to_string(), "again"), Ok(config));
    }
});
