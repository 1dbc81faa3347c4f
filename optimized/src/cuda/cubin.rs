//! Machine code of kernels, compiled once per machine, and what it takes of one.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use kernels::{Build, Source};

use super::device::{self, Compiled, Error};

static FOLDER: OnceLock<PathBuf> = OnceLock::new();

/// Keeps machine code in a folder from now on. The first call counts.
pub fn keep_in(folder: &Path) {
    let _ = FOLDER.set(folder.to_owned());
}

/// Bytes of a hash.
const HASH: usize = 32;

/// Machine code of a source for a target: from the folder, if it is there and whole.
pub(super) fn cubin(source: &Source, build: &Build, target: &str) -> Result<Vec<u8>, Error> {
    let (text, options) = (source.text(), options(build, target));
    let version = device::compiler_version()?;
    let place = FOLDER.get().map(|folder| {
        let of = format!("{version}\n{}\n{}\n{text}", options.join(" "), source.file);
        folder.join(format!("{}-{}.cubin", source.op, blake3::hash(of.as_bytes()).to_hex()))
    });
    if let Some(kept) = place.as_deref().and_then(read) {
        return Ok(kept);
    }
    let Compiled { cubin, .. } = device::compile(&text, source.file, &options)?;
    if let Some(place) = place {
        // Where it cannot be kept it is compiled again.
        let _ = write(&place, &cubin);
    }
    Ok(cubin)
}

/// What was kept, behind its hash; nothing if it is damaged or half of it.
fn read(place: &Path) -> Option<Vec<u8>> {
    let kept = fs::read(place).ok()?;
    let (hash, cubin) = kept.split_at_checked(HASH)?;
    (blake3::hash(cubin).as_bytes() == hash).then(|| cubin.to_vec())
}

/// Beside its place, then renamed: another run finds all of it or nothing.
fn write(place: &Path, cubin: &[u8]) -> std::io::Result<()> {
    let folder = place.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    let mut beside = tempfile::NamedTempFile::new_in(folder)?;
    beside.write_all(blake3::hash(cubin).as_bytes())?;
    beside.write_all(cubin)?;
    beside.persist(place)?;
    Ok(())
}

fn options(build: &Build, target: &str) -> Vec<String> {
    let mut options = vec![
        format!("--gpu-architecture={target}"),
        "--std=c++17".to_owned(),
        "-lineinfo".to_owned(),
        format!("-DE={}", build.activations),
    ];
    options.extend(build.weights.map(|weights| format!("-DW={weights}")));
    options
}

/// What a kernel takes of a multiprocessor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Used {
    /// The kernel.
    pub entry: String,
    /// What its tensors are stored in: `bf16`, or of narrowed weights `f32 Int8`.
    pub build: String,
    /// `sm_90a`.
    pub target: &'static str,
    /// Registers of a thread.
    pub registers: u32,
    /// Bytes of static shared memory of a block.
    pub shared: u32,
    /// Bytes of local memory of a thread.
    pub stack: u32,
    /// Bytes of registers that did not fit, stored and loaded.
    pub spilled: u32,
}

/// Compiles every kernel of a source for each of its targets, on any machine with a compiler, and says
/// what the assembler made of it.
///
/// # Errors
/// If one does not compile, or there is no compiler.
pub fn resources(source: &Source) -> Result<Vec<Used>, String> {
    let mut all = Vec::new();
    for build in source.builds() {
        for &target in source.targets {
            let mut options = options(&build, target);
            options.push("--ptxas-options=-v".to_owned());
            let compiled = device::compile(&source.text(), source.file, &options);
            let compiled = compiled.map_err(|error| format!("{target}: {error}"))?;
            let named = match build.weights {
                Some(weights) if weights != build.activations => {
                    format!("{} {weights}", build.activations)
                }
                _ => build.activations.to_owned(),
            };
            for entry in source.entries() {
                let used = used(&compiled.log, &entry.name);
                let [registers, shared, stack, spilled] = used.ok_or_else(|| {
                    format!("{target}: nothing said of {}:\n{}", entry.name, compiled.log)
                })?;
                let (entry, build) = (entry.name, named.clone());
                all.push(Used { entry, build, target, registers, shared, stack, spilled });
            }
        }
    }
    Ok(all)
}

/// Registers, shared memory, stack and spills of an entry, as the assembler's log has them.
fn used(log: &str, entry: &str) -> Option<[u32; 4]> {
    let (_, said) = log.split_once(&format!("Compiling entry function '{entry}'"))?;
    let said = said.split("Compiling entry function").next()?;
    let number = |behind: &str| {
        let before = said.split(behind).next().filter(|before| before.len() < said.len())?;
        before.rsplit(|c: char| !c.is_ascii_digit()).find(|word| !word.is_empty())?.parse().ok()
    };
    let spilled = number(" bytes spill stores")? + number(" bytes spill loads")?;
    let shared = number(" bytes smem").unwrap_or(0);
    Some([number(" registers")?, shared, number(" bytes stack frame")?, spilled])
}

#[cfg(test)]
mod tests {
    use super::{read, used, write};

    #[test]
    fn what_is_kept_comes_back_whole_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("kept/x.cubin");
        assert_eq!(read(&place), None);
        write(&place, b"machine code").unwrap();
        assert_eq!(read(&place).as_deref(), Some(&b"machine code"[..]));
        let whole = std::fs::read(&place).unwrap();
        for broken in [&whole[..0], &whole[..31], &whole[..40], &[&whole[..], b"!"].concat()] {
            std::fs::write(&place, broken).unwrap();
            assert_eq!(read(&place), None);
        }
        write(&place, b"again").unwrap();
        assert_eq!(read(&place).as_deref(), Some(&b"again"[..]));
    }

    #[test]
    fn the_assembler_is_understood() {
        let log = "\
ptxas info    : Compiling entry function 'a_naive' for 'sm_90a'
ptxas info    : Function properties for a_naive
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 8 bytes cumulative stack size, 1024 bytes smem
ptxas info    : Compiling entry function 'b_naive' for 'sm_90a'
ptxas info    : Function properties for b_naive
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 7 registers, used 0 barriers
";
        assert_eq!(used(log, "a_naive"), Some([32, 1024, 8, 16]));
        assert_eq!(used(log, "b_naive"), Some([7, 0, 0, 0]));
        assert_eq!(used(log, "c_naive"), None);
    }
}
