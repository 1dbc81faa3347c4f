//! The header of a safetensors file: every range it yields is inside the file.
#![no_main]

use golden::checkpoint::parse_header;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    // As it is, and behind the length that a header begins with.
    let framed = [&(data.len() as u64).to_le_bytes()[..], data].concat();
    for file in [data, &framed] {
        for (name, meta, bytes) in parse_header(file).unwrap_or_default() {
            let size = meta.shape.iter().product::<usize>() * meta.dtype.size();
            assert_eq!(file[bytes].len(), size, "{name}");
        }
    }
});
