//! Frames of the process door: `KRT1`, the header's length (u32, little-endian), a JSON header, and
//! as many bytes of safetensors as its `bytes` says.

use std::io::{self, Read, Write};

use serde_json::Value;

const MAGIC: &[u8; 4] = b"KRT1";
/// The most that a header may take.
const HEADER: u32 = 1 << 20;

/// Writes one frame; `header` gets `bytes`.
pub(crate) fn write(to: &mut impl Write, mut header: Value, payload: &[u8]) -> io::Result<()> {
    header["bytes"] = payload.len().into();
    let header = header.to_string();
    to.write_all(MAGIC)?;
    to.write_all(&(header.len() as u32).to_le_bytes())?;
    to.write_all(header.as_bytes())?;
    to.write_all(payload)?;
    to.flush()
}

/// Reads one frame whose payload takes at most `most` bytes.
///
/// # Errors
/// `None` where there is nothing at all; otherwise what is wrong with it, in words that follow "it".
pub(crate) fn read(from: &mut impl Read, most: u64) -> Result<(Value, Vec<u8>), Option<String>> {
    let short = |what: &str, got: usize, want: usize| {
        Some(format!("wrote too little: {got} of {want} bytes of {what}"))
    };
    let start = some(from, 8);
    if start.is_empty() {
        return Err(None);
    }
    let told = start.len().min(4);
    if start[..told] != MAGIC[..told] {
        let text: String = start.escape_ascii().to_string();
        return Err(Some(format!("wrote no frame: expected KRT1, got \"{text}\"")));
    }
    let (_, length) = start.split_at(told);
    let Some(length) = length.first_chunk().map(|length| u32::from_le_bytes(*length)) else {
        return Err(short("the start of a frame", start.len(), 8));
    };
    if HEADER < length {
        return Err(Some(format!("wrote a header of {length} bytes, at most {HEADER} expected")));
    }
    let header = some(from, u64::from(length));
    if header.len() < length as usize {
        return Err(short("a header", header.len(), length as usize));
    }
    let header: Value = serde_json::from_slice(&header)
        .map_err(|error| Some(format!("wrote a header that is no JSON: {error}")))?;
    let bytes = header["bytes"].as_u64().ok_or_else(|| {
        Some(format!("wrote a header without a number of bytes: {}", shortened(&header)))
    })?;
    if most < bytes {
        return Err(Some(format!("wrote too much: {bytes} bytes, at most {most} expected")));
    }
    let payload = some(from, bytes);
    if (payload.len() as u64) < bytes {
        return Err(short("tensors", payload.len(), bytes as usize));
    }
    Ok((header, payload))
}

/// Up to `most` bytes, fewer at the end.
fn some(from: &mut impl Read, most: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    // A pipe that breaks has ended.
    let _ = from.take(most).read_to_end(&mut bytes);
    bytes
}

fn shortened(header: &Value) -> String {
    header.to_string().chars().take(200).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{read, write};

    #[test]
    fn what_is_written_is_read() {
        let mut bytes = Vec::new();
        write(&mut bytes, json!({"karat": 1}), b"abc").unwrap();
        write(&mut bytes, json!({"call": "bye"}), b"").unwrap();
        let mut from = &bytes[..];
        assert_eq!(read(&mut from, 3).unwrap(), (json!({"karat": 1, "bytes": 3}), b"abc".to_vec()));
        assert_eq!(read(&mut from, 0).unwrap().0["call"], "bye");
        assert_eq!(read(&mut from, 0), Err(None));
    }

    #[test]
    fn what_is_no_frame_is_told() {
        let mut whole = Vec::new();
        write(&mut whole, json!({}), &[7; 100]).unwrap();
        let told = |bytes: &[u8]| read(&mut &bytes[..], 100).err().flatten().unwrap_or_default();
        assert_eq!(told(b"hello world"), "wrote no frame: expected KRT1, got \"hello wo\"");
        assert_eq!(told(b"KR"), "wrote too little: 2 of 8 bytes of the start of a frame");
        assert_eq!(told(&whole[..10]), "wrote too little: 2 of 13 bytes of a header");
        assert_eq!(told(&whole[..50]), "wrote too little: 29 of 100 bytes of tensors");
        assert_eq!(
            told(b"KRT1\xff\xff\xff\xff"),
            "wrote a header of 4294967295 bytes, at most 1048576 expected"
        );
        assert!(told(b"KRT1\x01\0\0\0{").starts_with("wrote a header that is no JSON"));
        assert_eq!(told(b"KRT1\x02\0\0\0{}"), "wrote a header without a number of bytes: {}");
        let much = read(&mut &whole[..], 99).err().flatten();
        assert_eq!(much.as_deref(), Some("wrote too much: 100 bytes, at most 99 expected"));
    }
}
