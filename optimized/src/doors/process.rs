//! The process door: any program, asked and answering in frames on standard input and output.
//!
//! ```text
//! karat   {"karat": 1, "call": "hello", "ops": ["rms_norm"]}
//! program {"karat": 1, "status": "ok"}
//! karat   {"karat": 1, "call": "run", "op": "rms_norm", "spec": "N3-D64;dtype=bf16",
//!          "case": {"N": 3, "D": 64}, "dtype": "bf16", "scalars": {"eps": 1e-6},
//!          "outputs": [{"name": "o", "dtype": "BF16", "shape": [3, 64]}, …]}   + inputs
//! program {"karat": 1, "status": "ok", "changed": []}                          + outputs
//!      or {"karat": 1, "status": "error", "message": "…"}
//! ```
//!
//! `changed` names inputs that the kernel wrote to, where the program looks (the Python helper does).
//! Standard input ends when nothing more is asked. Standard error is kept, and its last line told if
//! the program dies.

use std::{
    borrow::Cow,
    io::{BufReader, BufWriter},
    path::Path,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

use golden::Dtype;
use safetensors::{Dtype as StDtype, SafeTensors, View as StView};
use serde_json::{Value, json};

use super::{
    ABI, Door, Fault, Memory, Problem, Session, World,
    block::{Block, Layout},
    frame,
};

/// A program that was started and knows the ops.
pub(super) struct Program(Arc<Mutex<Running>>);

struct Running {
    child: Child,
    to: BufWriter<ChildStdin>,
    from: BufReader<ChildStdout>,
}

impl Program {
    /// Starts it and says hello.
    pub(super) fn start(
        command: &[String],
        folder: &Path,
        implements: &[String],
        world: &World,
    ) -> Result<Program, Fault> {
        let word = |word: &String| word.replace("{python}", &world.python);
        let words: Vec<String> = command.iter().map(word).collect();
        // A path is one of the folder, a bare name one of the search path.
        let program = if words[0].contains('/') && !words[0].starts_with('/') {
            let absolute = folder.canonicalize().unwrap_or(folder.to_owned());
            absolute.join(&words[0]).into_os_string()
        } else {
            words[0].clone().into()
        };
        let child = Command::new(&program)
            .args(&words[1..])
            .current_dir(folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        let mut child = child.map_err(|e| Fault::Refused(format!("command: {}: {e}", words[0])))?;
        let (Some(to), Some(from)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(Fault::Refused("command: no pipes".to_owned()));
        };
        let mut running = Running { child, to: BufWriter::new(to), from: BufReader::new(from) };
        let hello = json!({"karat": ABI, "call": "hello", "ops": implements});
        let (answer, _) = running.ask(hello, &[], 0)?;
        if let Some(known) = answer["ops"].as_array()
            && let Some(op) = implements.iter().find(|op| !known.iter().any(|k| k == op.as_str()))
        {
            return Err(Fault::Refused(format!("{}: does not know {op}", words.join(" "))));
        }
        Ok(Program(Arc::new(Mutex::new(running))))
    }
}

impl Door for Program {
    fn begin(&self, _: &Problem, _: &mut Memory) -> Result<Box<dyn Session>, Fault> {
        Ok(Box::new(Asking(self.0.clone())))
    }
}

struct Asking(Arc<Mutex<Running>>);

impl Session for Asking {
    fn run(&mut self, problem: &Problem, memory: &mut Memory) -> Result<(), Fault> {
        let most: usize = memory.outputs.iter().map(|block| block.layout.size()).sum();
        let inputs = memory.inputs.iter().map(|block| (block.layout.name, Tensor(block)));
        let inputs = safetensors::serialize(inputs, None)
            .map_err(|e| Fault::Refused(format!("inputs: {e}")))?;
        let mut running = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (answer, outputs) =
            running.ask(request(problem, memory), &inputs, most as u64 + (1 << 16))?;
        take(&outputs, memory).map_err(Fault::Died)?;
        let changed: Vec<&str> =
            answer["changed"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        if !changed.is_empty() {
            memory.confessed = Some(format!("input {} was changed", changed.join(", ")));
        }
        Ok(())
    }
}

fn request(problem: &Problem, memory: &Memory) -> Value {
    let Problem { op, spec, sizes, dtype, scalars } = problem;
    let case: serde_json::Map<String, Value> =
        sizes.iter().map(|&(letter, size)| (letter.to_owned(), size.into())).collect();
    let scalars: serde_json::Map<String, Value> =
        scalars.iter().map(|&(name, value)| (name.to_owned(), value.into())).collect();
    let outputs: Vec<Value> = memory
        .outputs
        .iter()
        .map(|Block { layout, .. }| {
            json!({"name": layout.name, "dtype": stored(layout.dtype).to_string(), "shape": layout.shape})
        })
        .collect();
    json!({
        "karat": ABI, "call": "run", "op": op, "spec": spec, "case": case, "dtype": dtype.name(),
        "scalars": scalars, "outputs": outputs,
    })
}

/// Puts an answer's tensors into memory. A tensor of another shape stays one: it is judged.
fn take(payload: &[u8], memory: &mut Memory) -> Result<(), String> {
    let tensors =
        SafeTensors::deserialize(payload).map_err(|e| format!("it wrote no tensors: {e}"))?;
    let asked = |name: &String| memory.outputs.iter().any(|block| block.layout.name == name);
    if let Some(name) = tensors.names().into_iter().find(|name| !asked(&(*name).to_owned())) {
        return Err(format!("it wrote {name}, which is no output"));
    }
    for block in &mut memory.outputs {
        let name = block.layout.name;
        let tensor = tensors.tensor(name).map_err(|_| format!("it did not write {name}"))?;
        if tensor.dtype() != stored(block.layout.dtype) {
            let want = stored(block.layout.dtype);
            return Err(format!("it wrote {name} as {}, expected {want}", tensor.dtype()));
        }
        if tensor.shape() != block.layout.shape {
            let layout = Layout { shape: tensor.shape().to_vec(), ..block.layout.clone() };
            *block = Block::new(layout);
        }
        block.data_mut().copy_from_slice(tensor.data());
    }
    Ok(())
}

impl Running {
    /// Sends a frame and waits for the answer to it.
    fn ask(&mut self, header: Value, payload: &[u8], most: u64) -> Result<(Value, Vec<u8>), Fault> {
        let Running { child, to, from } = self;
        // It may write before it has read everything: both at once, or both wait for ever.
        let answer = thread::scope(|scope| {
            let writing = scope.spawn(|| frame::write(to, header, payload));
            let answer = frame::read(from, most);
            if answer.is_err() {
                // Who has not answered will not read on either. Whoever closed its output is most
                // likely about to end by itself, and how it ends is what is told.
                if matches!(answer, Err(None)) {
                    leave(child);
                }
                let _ = child.kill();
            }
            let _ = writing.join();
            answer
        });
        let (header, payload) = match answer {
            Ok(answer) => answer,
            Err(None) => {
                let ended =
                    child.wait().map_or_else(|e| e.to_string(), |status| status.to_string());
                return Err(Fault::Died(format!("it ended ({ended}) without an answer")));
            }
            Err(Some(what)) => return Err(Fault::Died(format!("it {what}"))),
        };
        if header["karat"] != ABI {
            let got = &header["karat"];
            return Err(Fault::Refused(format!("it speaks version {got}, expected {ABI}")));
        }
        match header["status"].as_str() {
            Some("ok") => Ok((header, payload)),
            Some("error") => {
                let message = header["message"].as_str().unwrap_or("without a message");
                Err(Fault::Died(format!("it says: {}", message.replace('\n', " "))))
            }
            _ => Err(Fault::Died(format!("it wrote status {}, expected ok", header["status"]))),
        }
    }
}

/// How often a program that closed its output is looked at, and how long it is left alone in between:
/// it has 200 ms to end by itself.
const LOOKS: u32 = 100;
const BETWEEN: Duration = Duration::from_millis(2);

/// Waits until it has ended by itself, but not for long.
fn leave(child: &mut Child) {
    for _ in 0..LOOKS {
        if !matches!(child.try_wait(), Ok(None)) {
            return;
        }
        thread::sleep(BETWEEN);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A block as safetensors sees it.
struct Tensor<'a>(&'a Block);

impl StView for Tensor<'_> {
    fn dtype(&self) -> StDtype {
        stored(self.0.layout.dtype)
    }
    fn shape(&self) -> &[usize] {
        &self.0.layout.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        self.0.data().into()
    }
    fn data_len(&self) -> usize {
        self.0.layout.size()
    }
}

fn stored(dtype: Dtype) -> StDtype {
    match dtype {
        Dtype::F64 => StDtype::F64,
        Dtype::F32 => StDtype::F32,
        Dtype::F16 => StDtype::F16,
        Dtype::Bf16 => StDtype::BF16,
        Dtype::I64 => StDtype::I64,
        Dtype::Fp8 | Dtype::U8 => StDtype::U8,
    }
}
