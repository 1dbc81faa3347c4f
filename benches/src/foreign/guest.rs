//! A process that runs a foreign kernel, as its host sees it.

use std::{
    fs::File,
    io::{BufRead, BufReader, Write},
    os::unix::process::{CommandExt, ExitStatusExt},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, ExitStatus, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError, channel},
    thread,
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::Value;

use super::Isolation;

/// A running `karat child`, alone in its process group.
#[derive(Debug)]
pub(super) struct Guest {
    process: Child,
    to: Option<ChildStdin>,
    replies: Receiver<Value>,
    timeout: Duration,
    /// Bytes of its log that belong to earlier requests.
    said: usize,
    /// The most memory that it may take.
    pub(super) limit: u64,
    /// How many threads it was told to take.
    pub(super) threads: Option<usize>,
    /// Where it puts tensors.
    pub(super) file: PathBuf,
}

/// What libraries of kernels take the number of their threads from.
const THREADS: [&str; 4] =
    ["OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"];

/// Why there is no reply.
pub(super) enum Ended {
    /// It took too long.
    Timeout,
    /// It is no more, or was never.
    Died(String),
}

impl Guest {
    /// Starts one, and waits until it has opened the door: returns what it says of that.
    pub(super) fn start(
        isolation: &Isolation,
        kernel: &Path,
        limit: u64,
        threads: Option<usize>,
        file: PathBuf,
    ) -> Result<(Guest, Value), Ended> {
        let died = |e: std::io::Error| Ended::Died(format!("{}: {e}", isolation.exe.display()));
        let log = File::create(log(&file)).map_err(died)?;
        let mut process = Command::new(&isolation.exe)
            .args(["child", "--memory", &limit.to_string(), "--python", &isolation.python])
            .arg("--kernel")
            .arg(kernel)
            .envs(isolation.variables.iter().map(|(name, value)| (name, value)))
            .envs(threads.iter().flat_map(|n| THREADS.map(|name| (name, n.to_string()))))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .process_group(0)
            .spawn()
            .map_err(died)?;
        let to = process.stdin.take();
        let (sender, replies) = channel();
        if let Some(from) = process.stdout.take() {
            // Ends with the process: its end of the pipe is then closed.
            thread::spawn(move || {
                for line in BufReader::new(from).lines().map_while(Result::ok) {
                    let Ok(reply) = serde_json::from_str(&line) else { return };
                    if sender.send(reply).is_err() {
                        return;
                    }
                }
            });
        }
        let mut guest = Guest {
            process,
            to,
            replies,
            timeout: isolation.timeout,
            said: 0,
            limit,
            threads,
            file,
        };
        let ready = guest.reply()?;
        Ok((guest, ready))
    }

    /// Sends a request and waits for the reply.
    pub(super) fn ask(&mut self, request: &Value) -> Result<Value, Ended> {
        self.said = std::fs::metadata(log(&self.file)).map_or(0, |log| log.len() as usize);
        // If it does not read it does not reply.
        let _ = self.to.as_mut().map(|to| to.write_all(format!("{request}\n").as_bytes()));
        self.reply()
    }

    fn reply(&mut self) -> Result<Value, Ended> {
        match self.replies.recv_timeout(self.timeout) {
            Ok(reply) => Ok(reply),
            Err(RecvTimeoutError::Timeout) => Err(Ended::Timeout),
            Err(RecvTimeoutError::Disconnected) => {
                self.kill();
                let status = self.process.wait();
                let how = status.map_or_else(|e| e.to_string(), |status| self.told(status));
                Err(Ended::Died(how))
            }
        }
    }

    /// The whole group: programs that it started as well.
    fn kill(&mut self) {
        // Its end is waited for before a kill can meet another group of this number.
        if let Some(pid) = Pid::from_raw(self.process.id() as i32) {
            let _ = kill_process_group(pid, Signal::KILL);
        }
    }

    fn told(&self, status: ExitStatus) -> String {
        let how = match status.signal() {
            Some(signal) => {
                let name = match signal {
                    4 => "SIGILL, illegal instruction",
                    6 => "SIGABRT, aborted",
                    7 => "SIGBUS, bus error",
                    8 => "SIGFPE, arithmetic error",
                    9 => "SIGKILL, killed",
                    11 => "SIGSEGV, segmentation fault",
                    _ => "a signal",
                };
                let limit = self.limit as f64 / f64::from(1 << 30);
                format!("its process ended by {name} ({signal}), memory limit {limit:.1} GiB")
            }
            None => format!("its process ended with {status}"),
        };
        self.with_last_words(how)
    }

    /// How it failed, with the last line that it wrote to standard error since it was asked.
    pub(super) fn with_last_words(&self, how: String) -> String {
        match self.last_words() {
            Some(words) if !how.contains(&words) => format!("{how}: {words}"),
            _ => how,
        }
    }

    fn last_words(&self) -> Option<String> {
        let log = std::fs::read(log(&self.file)).ok()?;
        let log = String::from_utf8_lossy(log.get(self.said..)?);
        let line = log.lines().rev().find(|line| !line.trim().is_empty())?;
        Some(line.trim().chars().take(300).collect())
    }
}

/// Its standard error.
fn log(file: &Path) -> PathBuf {
    file.with_extension("log")
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.kill();
        let _ = self.process.wait();
    }
}
