//! Builds of revisions, in a worktree under `target/karat/ab`, kept by commit.
//!
//! One worktree is moved from revision to revision: programs then hold the same paths, and the second build
//! compiles only what differs.

use std::{
    fs,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process_group};

use crate::{
    exit::{Exit, fail, refuse},
    files,
    out::{self, Out},
};

/// A side: a program, and what it is called.
#[derive(Clone, Debug)]
pub(super) struct Side {
    pub(super) program: PathBuf,
    pub(super) name: String,
}

/// How revisions are built.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub(crate) enum Profile {
    /// As it is used.
    Release,
    /// As it is tested.
    Dev,
}

impl Profile {
    fn name(self) -> &'static str {
        match self {
            Profile::Release => "release",
            Profile::Dev => "dev",
        }
    }

    /// The folder of what is built so.
    fn folder(self) -> &'static str {
        match self {
            Profile::Release => "release",
            Profile::Dev => "debug",
        }
    }
}

/// The program of a revision, or of a file that is one; built if it has to be.
pub(super) fn side(rev: &str, profile: Profile, out: &Out) -> anyhow::Result<Side> {
    let path = Path::new(rev);
    if path.is_file() {
        let program = fs::canonicalize(path).map_err(|e| refuse(format!("{rev}: {e}")))?;
        return Ok(Side { program, name: rev.to_owned() });
    }
    let commit = git(&["rev-parse", "--verify", "--quiet", &format!("{rev}^{{commit}}")], None)
        .map_err(|why| match why {
            Failed::Missing(why) => fail(Exit::Unfit, format!("git: {why}")),
            Failed::Said(why) => {
                let why = if why.is_empty() { String::new() } else { format!(": {why}") };
                refuse(format!("{rev}: neither a revision of this repository nor a program{why}"))
            }
        })?;
    let short = &commit[..commit.len().min(12)];
    let name = format!("{rev} ({short})");
    let home = std::path::absolute(files::cache_dir().join("ab"))?;
    let kept = home.join("bin").join(format!("{short}-{}", profile.name()));
    if kept.is_file() {
        out.note(&format!("{name}: built before"));
        return Ok(Side { program: kept, name });
    }
    let worktree = home.join("tree");
    check_out(&worktree, &commit)?;
    let target = home.join("target");
    build(&worktree, &target, profile, &name, out)?;
    let built = target.join(profile.folder()).join("karat");
    let unfit = |e: std::io::Error| fail(Exit::Unfit, format!("{}: {e}", kept.display()));
    fs::create_dir_all(home.join("bin")).map_err(unfit)?;
    let beside = kept.with_extension("part");
    fs::copy(&built, &beside)
        .and_then(|_| fs::rename(&beside, &kept))
        .map_err(|e| fail(Exit::Unfit, format!("{}: {e}", built.display())))?;
    Ok(Side { program: kept, name })
}

/// Why git did not do it.
enum Failed {
    /// There is none.
    Missing(String),
    /// In its own words.
    Said(String),
}

fn git(args: &[&str], folder: Option<&Path>) -> Result<String, Failed> {
    let mut command = Command::new("git");
    if let Some(folder) = folder {
        command.arg("-C").arg(folder);
    }
    let output = command.args(args).stdin(Stdio::null()).output();
    let output = output.map_err(|e| Failed::Missing(e.to_string()))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(Failed::Said(said.lines().last().unwrap_or_default().trim().to_owned()))
}

/// A worktree at a commit: the one that is there, moved on, or a new one.
fn check_out(worktree: &Path, commit: &str) -> anyhow::Result<()> {
    let told = |failed: Failed| {
        let (Failed::Missing(why) | Failed::Said(why)) = failed;
        fail(Exit::Unfit, format!("{}: {why}", worktree.display()))
    };
    if worktree.join(".git").exists() {
        git(&["checkout", "--quiet", "--force", "--detach", commit], Some(worktree))
            .map_err(told)?;
        return Ok(());
    }
    // What was removed by hand is still known to git.
    let _ = git(&["worktree", "prune"], None);
    let path = worktree.to_string_lossy();
    git(&["worktree", "add", "--quiet", "--force", "--detach", &path, commit], None)
        .map_err(told)?;
    Ok(())
}

/// Builds karat there; cargo tells its own progress.
fn build(
    worktree: &Path,
    target: &Path,
    profile: Profile,
    name: &str,
    out: &Out,
) -> anyhow::Result<()> {
    out.note(&format!("{name}: building"));
    let mut command = Command::new("cargo");
    command
        .args(["build", "--locked", "--package", "ci", "--bin", "karat", "--profile"])
        .arg(profile.name())
        .arg("--target-dir")
        .arg(target)
        .current_dir(worktree)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .process_group(0);
    if out.quiet {
        command.arg("--quiet");
    }
    let status = command.spawn().and_then(ended);
    let status = status.map_err(|e| fail(Exit::Unfit, format!("cargo: {e}")))?;
    if out::interrupted() {
        return Err(fail(Exit::Interrupted, "interrupted"));
    }
    if !status.success() {
        return Err(refuse(format!("{name}: it cannot be built")));
    }
    Ok(())
}

/// How a program that leads a group ended; an interrupt ends it, and all that it started.
fn ended(mut leader: Child) -> std::io::Result<ExitStatus> {
    loop {
        if let Some(status) = leader.try_wait()? {
            return Ok(status);
        }
        if out::interrupted() {
            // It is waited for after: no other group can have its number yet.
            if let Some(pid) = Pid::from_raw(leader.id() as i32) {
                kill_process_group(pid, Signal::KILL)?;
            }
            return leader.wait();
        }
        thread::sleep(Duration::from_millis(50));
    }
}
