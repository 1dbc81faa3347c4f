//! `karat golden diff` and `accept`: nobody changes a golden in passing.

use golden::{
    View,
    compare::{Bound, views},
    recording::{Recorded, Recording},
};
use serde_json::json;

use super::{open, plain, record::amend, recordings};
use crate::{
    exit::{Exit, fail, refuse},
    out::Out,
};

#[derive(Debug, clap::Args)]
pub(super) struct DiffArgs {
    /// The recording
    id: String,
}

#[derive(Debug, clap::Args)]
pub(super) struct AcceptArgs {
    /// The recording
    id: String,
    /// Why the new one is right
    #[arg(long)]
    reason: String,
}

/// Every tap of the new recording beside the accepted one.
pub(super) fn diff(args: &DiffArgs, out: &Out) -> anyhow::Result<Exit> {
    plain(&args.id)?;
    let (old, new) = (open(&args.id)?, fresh(&args.id)?);
    let mut rows = Vec::new();
    let mut same = 0;
    for tap in &new.manifest.taps {
        let (Some(want), Some(got)) = (old.get(&tap.name), new.get(&tap.name)) else {
            rows.push(vec![tap.name.clone(), "added".to_owned(), String::new()]);
            continue;
        };
        let bound = Bound::Relative { rel_rms: 0.0, worst_token: 0.0 };
        let finding = views(&tap.name, &view(&want), &view(&got), bound);
        if finding.max_abs == 0.0 {
            same += 1;
            continue;
        }
        out.json(&json!({"schema": "karat.result/1", "kind": "golden", "recording": args.id, "tap": tap.name,
            "rel_rms": finding.rel_rms.to_string(), "worst_token": finding.worst_token.to_string()}));
        rows.push(vec![
            tap.name.clone(),
            format!("{:.2e}", finding.rel_rms),
            format!("{:.2e}", finding.worst_token),
        ]);
    }
    let gone = old
        .manifest
        .taps
        .iter()
        .filter(|tap| !new.manifest.taps.iter().any(|other| other.name == tap.name));
    rows.extend(gone.map(|tap| vec![tap.name.clone(), "gone".to_owned(), String::new()]));
    out.line(&format!("{}: {same} taps equal, {} not", args.id, rows.len()));
    if !rows.is_empty() {
        out.table(&["tap", "rel-RMS", "worst row"], &rows);
    }
    Ok(if rows.is_empty() { Exit::Ok } else { Exit::Wrong })
}

/// Puts the new recording in the place of the accepted one.
pub(super) fn accept(args: &AcceptArgs, out: &Out) -> anyhow::Result<Exit> {
    if args.reason.trim().is_empty() {
        return Err(refuse("--reason: expected why the new recording is right"));
    }
    plain(&args.id)?;
    let new = fresh(&args.id)?;
    let place = recordings().join(&args.id);
    let supersedes =
        if place.exists() { Some(open(&args.id)?.manifest.recording.blake3) } else { None };
    let old = recordings().join(format!(".{}.old", args.id));
    let unfit = |e: std::io::Error| fail(Exit::Unfit, format!("{}: {e}", place.display()));
    amend(&new.dir, |manifest| {
        manifest["reason"] = json!(args.reason);
        manifest["supersedes"] = json!(supersedes);
    })?;
    if place.exists() {
        std::fs::rename(&place, &old).map_err(unfit)?;
    }
    std::fs::rename(&new.dir, &place).map_err(unfit)?;
    if old.exists() {
        std::fs::remove_dir_all(&old).map_err(unfit)?;
    }
    out.line(&format!("{}: accepted", args.id));
    Ok(Exit::Ok)
}

fn fresh(id: &str) -> anyhow::Result<Recording> {
    let dir = recordings().join(format!("{id}.new"));
    if !dir.exists() {
        return Err(fail(
            Exit::Recording,
            format!("{}: no new recording; `karat golden record {id}` makes one", dir.display()),
        ));
    }
    Recording::open(&dir).map_err(|e| fail(Exit::Recording, e.to_string()))
}

fn view(x: &Recorded) -> View<'_> {
    match x {
        Recorded::F32(x) => View::F32(x.view()),
        Recorded::F64(x) => View::F64(x.view()),
        Recorded::I64(x) => View::I64(x.view()),
        Recorded::U8(x) => View::U8(x.view()),
    }
}
