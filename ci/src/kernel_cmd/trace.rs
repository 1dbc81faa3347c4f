//! `karat kernel export` and `karat kernel import`: problems in the words of FlashInfer Trace.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use benches::{plan::Job, trace};
use serde_json::{Value, json};

use crate::{
    exit::{Exit, fail, refuse},
    files,
    list::Selection,
    out::Out,
};

#[derive(Debug, clap::Args)]
pub(crate) struct Export {
    #[command(flatten)]
    selection: Selection,
    /// The root of the data set: definitions, workloads and blob are written below it.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Import {
    /// Workloads: a file of JSON lines, or the root of a data set.
    from: PathBuf,
    /// Definitions, where they are not in the data set.
    #[arg(long, value_name = "FILE")]
    definition: Vec<PathBuf>,
}

pub(crate) fn export(args: &Export, out: &Out) -> anyhow::Result<Exit> {
    let jobs = args.selection.jobs(&[])?;
    let mut problems: Vec<&Job> =
        jobs.iter().filter(|job| trace::ops().any(|op| op == job.entry.name())).collect();
    problems.dedup_by(|a, b| (a.entry.name(), &a.spec) == (b.entry.name(), &b.spec));
    if problems.is_empty() {
        let known = trace::ops().collect::<Vec<_>>().join(", ");
        return Err(fail(
            Exit::Nothing,
            format!("nothing selected; FlashInfer Trace knows {known}"),
        ));
    }
    // All workloads of a definition are lines of one file.
    let mut lines: BTreeMap<PathBuf, String> = BTreeMap::new();
    let write = |path: &Path, data: &[u8]| {
        let told = |e| fail(Exit::Unfit, format!("{}: {e}", path.display()));
        files::replace(path, data).map_err(told)
    };
    for job in &problems {
        let made = trace::export(job.entry, &job.spec).map_err(refuse)?;
        let folder = args.out.join("definitions").join(made.kind);
        let mut text = serde_json::to_string_pretty(&made.definition)?;
        text.push('\n');
        write(&folder.join(format!("{}.json", made.name)), text.as_bytes())?;
        write(&args.out.join(&made.blob), &made.tensors)?;
        let folder = args.out.join("workloads").join(made.kind);
        let file = lines.entry(folder.join(format!("{}.jsonl", made.name))).or_default();
        file.push_str(&made.workload.to_string());
        file.push('\n');
        let id = format!("{}/{}", job.entry.name(), job.spec);
        out.json(&json!({
            "schema": "karat.result/1", "kind": "kernel_export", "case": id, "definition": made.name,
            "uuid": made.workload["workload"]["uuid"],
        }));
        if out.verbose {
            out.line(&format!("{id} {}", made.name));
        }
    }
    for (file, text) in &lines {
        write(file, text.as_bytes())?;
        out.line(&file.display().to_string());
    }
    out.note(&format!("{} workloads of {} definitions", problems.len(), lines.len()));
    Ok(Exit::Ok)
}

pub(crate) fn import(args: &Import, out: &Out) -> anyhow::Result<Exit> {
    let root = args.from.is_dir().then_some(args.from.as_path());
    let mut definitions: BTreeMap<String, Value> = BTreeMap::new();
    let mut files = args.definition.clone();
    let mut workloads = Vec::new();
    match root {
        Some(root) => {
            files.extend(below(&root.join("definitions"), "json")?);
            workloads.extend(below(&root.join("workloads"), "jsonl")?);
        }
        None => workloads.push(args.from.clone()),
    }
    for file in &files {
        let definition: Value = serde_json::from_str(&read(file)?)
            .map_err(|e| refuse(format!("{}: {e}", file.display())))?;
        let name = definition["name"]
            .as_str()
            .ok_or_else(|| refuse(format!("{}: name: expected text", file.display())))?;
        definitions.insert(name.to_owned(), definition);
    }
    let mut found = 0;
    for file in &workloads {
        let root = root.map_or_else(|| root_of(file), Path::to_owned);
        for (at, line) in
            read(file)?.lines().enumerate().filter(|(_, line)| !line.trim().is_empty())
        {
            let told = |why: String| refuse(format!("{}:{}: {why}", file.display(), at + 1));
            let workload: Value = serde_json::from_str(line).map_err(|e| told(e.to_string()))?;
            let name = workload["definition"].as_str();
            // A workload alone is of the one definition that was given.
            let definition = match name {
                Some(name) => definitions.get(name),
                None => definitions.values().next().filter(|_| definitions.len() == 1),
            };
            let definition = definition.ok_or_else(|| {
                told(format!(
                    "no definition {}; give it with --definition",
                    name.unwrap_or("named")
                ))
            })?;
            let got = trace::import(definition, &workload, &root).map_err(told)?;
            found += 1;
            out.line(&got.id);
            if let Some(remark) = &got.remark {
                out.note(&format!("{}: {remark}", got.id));
            }
            out.json(&json!({
                "schema": "karat.result/1", "kind": "kernel_import", "case": got.id, "same": got.same,
                "definition": definition["name"], "why": got.remark,
            }));
        }
    }
    if found == 0 {
        return Err(fail(Exit::Nothing, format!("{}: no workloads", args.from.display())));
    }
    Ok(Exit::Ok)
}

/// Where the paths of a file of workloads start: the root of the data set if it lies in one, in
/// `workloads/<kind>`, or else its folder.
fn root_of(file: &Path) -> PathBuf {
    // The folders above it may be those that the program was started in.
    let file = std::path::absolute(file).unwrap_or_else(|_| file.to_owned());
    let folder = file.parent().unwrap_or(Path::new("."));
    let set = folder.parent().filter(|all| all.file_name().is_some_and(|name| name == "workloads"));
    set.and_then(Path::parent).unwrap_or(folder).to_owned()
}

fn read(file: &Path) -> anyhow::Result<String> {
    fs::read_to_string(file).map_err(|e| refuse(format!("{}: {e}", file.display())))
}

/// Files of a kind in the folders of a folder, by name.
fn below(folder: &Path, extension: &str) -> anyhow::Result<Vec<PathBuf>> {
    let entries = |folder: &Path| -> anyhow::Result<Vec<PathBuf>> {
        let told = |e: std::io::Error| refuse(format!("{}: {e}", folder.display()));
        let all = fs::read_dir(folder).map_err(told)?;
        let mut all =
            all.map(|entry| Ok(entry.map_err(told)?.path())).collect::<anyhow::Result<Vec<_>>>()?;
        all.sort();
        Ok(all)
    };
    let mut files = Vec::new();
    for inside in entries(folder)?.into_iter().filter(|path| path.is_dir()) {
        files.extend(
            entries(&inside)?
                .into_iter()
                .filter(|path| path.extension().is_some_and(|e| e == extension)),
        );
    }
    Ok(files)
}
