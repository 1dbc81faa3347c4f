use std::{fs, path::Path};

use golden::{
    Engine,
    config::Preset,
    engine::{Rows, Want},
    synthetic::Synthetic,
};

use super::{Format, Store, StoreError};
use crate::cpu::{
    model::{Kept, Loading, Model},
    simd::Plain,
};

fn weights(seed: u64) -> Synthetic {
    Synthetic::new(Preset::Tiny.config(Some(4), None).unwrap(), seed)
}

/// A store, and what was noted on the way.
fn ready(path: &Path, seed: u64, number: &str) -> (Result<Store, StoreError>, Vec<String>) {
    let mut notes = Vec::new();
    let mut note = |line: &str| notes.push(line.to_owned());
    let store = Store::ready(path, &weights(seed), number, &mut |_, _| true, &mut note);
    (store, notes)
}

/// Logits of a text, by weights from a file or narrowed on the way.
fn logits(seed: u64, format: Format, store: Option<&Store>) -> Vec<u32> {
    let mut told = Vec::new();
    let mut tell = |done, total| {
        told.push((done, total));
        true
    };
    let mut loading = Loading { tell: &mut tell, store };
    let mut model =
        Model::new(Plain, &weights(seed), (format, format.kept()), &mut loading).unwrap();
    assert!(told.is_sorted());
    assert_eq!(told.last().is_some_and(|(done, total)| done == total), store.is_none());
    model.reset(1).unwrap();
    let want = Want { logits: Rows::All, ..Want::default() };
    let step = model.forward(&[vec![5, 1, 4, 2, 200, 7]], &want).unwrap();
    step.logits.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn a_file_says_what_was_narrowed() {
    let folder = tempfile::tempdir().unwrap();
    for (number, format) in [("int8", Format::Int8), ("int4", Format::Int4)] {
        let path = folder.path().join(number);
        let want = logits(3, format, None);
        for made in [true, false] {
            let before = fs::metadata(&path).and_then(|meta| meta.modified()).ok();
            let (store, notes) = ready(&path, 3, number);
            assert_eq!(logits(3, format, Some(&store.unwrap())), want, "{number}, made {made}");
            assert_eq!(notes, [""; 0]);
            let after = fs::metadata(&path).and_then(|meta| meta.modified()).ok();
            assert_eq!(before == after, !made, "a whole file is not written again");
        }
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2, "nothing else is left");
    assert!(matches!(ready(&folder.path().join("x"), 3, "bf16").0, Err(StoreError::Weights(_))));
}

#[test]
fn a_file_that_is_not_right_is_made_anew() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("narrowed");
    ready(&path, 3, "int8").0.unwrap();
    let whole = fs::read(&path).unwrap();
    let want = logits(3, Format::Int8, None);
    let header = 8 + u64::from_le_bytes(*whole.first_chunk().unwrap()) as usize;
    let flipped = |at: usize| {
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        bytes
    };
    let more = [&whole[..], &[0]].concat();
    for damaged in [
        whole[..whole.len() - 1].to_vec(),
        whole[..header + 5].to_vec(),
        whole[..header].to_vec(),
        more,
        flipped(header),
        flipped(whole.len() / 2),
        flipped(whole.len() - 1),
    ] {
        fs::write(&path, damaged).unwrap();
        let (store, notes) = ready(&path, 3, "int8");
        assert_eq!(logits(3, Format::Int8, Some(&store.unwrap())), want);
        assert!(matches!(&notes[..], [note] if note.contains("damaged")), "{notes:?}");
        assert!(fs::read(&path).unwrap() == whole, "made anew");
    }
    // Other weights, another format.
    for (seed, number) in [(4, "int8"), (4, "int4")] {
        let (store, notes) = ready(&path, seed, number);
        let format = Format::of(number).unwrap();
        assert_eq!(logits(seed, format, Some(&store.unwrap())), logits(seed, format, None));
        assert!(matches!(&notes[..], [note] if note.contains("another")), "{notes:?}");
    }
}

#[test]
fn what_is_no_such_file_stays() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("letter");
    for text in [&b"dear"[..], b"", b"\x02\0\0\0\0\0\0\0{}", &[0xff; 64]] {
        fs::write(&path, text).unwrap();
        assert!(matches!(ready(&path, 3, "int8").0, Err(StoreError::Foreign(_))), "{text:?}");
        assert_eq!(fs::read(&path).unwrap(), text);
    }
    assert!(matches!(ready(folder.path(), 3, "int8").0, Err(StoreError::Io(_))));
    let nowhere = folder.path().join("no/such/folder");
    assert!(matches!(ready(&nowhere, 3, "int8").0, Err(StoreError::Io(_))));
}

#[test]
fn an_interrupted_narrowing_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("narrowed");
    let mut left = 5;
    let mut tell = |_, _| {
        left -= 1;
        0 < left
    };
    let store = Store::ready(&path, &weights(3), "int8", &mut tell, &mut |_| ());
    assert!(matches!(store, Err(StoreError::Interrupted)));
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    let mut tell = |_, _| false;
    let mut loading = Loading { tell: &mut tell, store: None };
    let model = Model::new(Plain, &weights(3), (Format::Int8, Kept::Bf16), &mut loading);
    assert_eq!(model.err().map(|e| e.to_string()).as_deref(), Some("interrupted"));
    // A file of another format is not taken for one's own.
    let (store, _) = ready(&path, 3, "int8");
    let mut tell = |_, _| true;
    let mut loading = Loading { tell: &mut tell, store: Some(&store.unwrap()) };
    assert!(Model::new(Plain, &weights(3), (Format::Int4, Kept::Bf16), &mut loading).is_err());
}
