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
//! karat   {"karat": 1, "call": "time", "times": 5, "group": 20, "away": null, … as for run}   + inputs
//! program {"karat": 1, "status": "ok", "changed": [], "samples_ns": [812.4, …],
//!          "clock": "program clock"}                                           + outputs of the last call
//! ```
//!
//! To `hello` a program may answer `"status": "unfit"` with a message: what it needs is not here. Who answers
//! `"times": true` there answers `time` as well: it takes the inputs, calls once, and then times calls on
//! inputs that stay where they are.
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

use golden::{Calls, Clock, Clocked, Dtype};
use safetensors::{Dtype as StDtype, SafeTensors, View as StView};
use serde_json::{Value, json};

use super::{
    ABI, Door, Fault, Memory, Problem, Session, World,
    block::{Block, Layout},
    frame,
};

/// A program that was started and knows the ops.
pub(super) struct Program {
    running: Arc<Mutex<Running>>,
    /// Whether it times its calls.
    times: bool,
}

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
        if answer["status"] == "unfit" {
            let why = answer["message"].as_str().unwrap_or("it does not say why");
            return Err(Fault::Unfit(why.replace('\n', " ")));
        }
        if let Some(known) = answer["ops"].as_array()
            && let Some(op) = implements.iter().find(|op| !known.iter().any(|k| k == op.as_str()))
        {
            return Err(Fault::Refused(format!("{}: does not know {op}", words.join(" "))));
        }
        let times = answer["times"] == true;
        Ok(Program { running: Arc::new(Mutex::new(running)), times })
    }
}

impl Door for Program {
    fn begin(&self, _: &Problem, _: &mut Memory) -> Result<Box<dyn Session>, Fault> {
        Ok(Box::new(Asking { running: self.running.clone(), times: self.times }))
    }
}

struct Asking {
    running: Arc<Mutex<Running>>,
    times: bool,
}

impl Session for Asking {
    fn run(&mut self, problem: &Problem, memory: &mut Memory) -> Result<(), Fault> {
        self.ask(request("run", problem, memory), memory).map(|_| ())
    }

    fn clocked(
        &mut self,
        problem: &Problem,
        memory: &mut Memory,
        calls: &Calls,
    ) -> Result<Option<Clocked>, Fault> {
        if !self.times {
            return Err(Fault::Unfit("its program does not answer `time`".to_owned()));
        }
        let mut asked = request("time", problem, memory);
        asked["times"] = calls.times.into();
        asked["group"] = calls.group.into();
        asked["away"] = calls.away.into();
        let answer = self.ask(asked, memory)?;
        clocked(&answer, calls.times).map(Some).map_err(Fault::Died)
    }
}

/// What a program says of its calls.
fn clocked(answer: &Value, times: usize) -> Result<Clocked, String> {
    let samples = answer["samples_ns"].as_array().ok_or("it told no samples_ns")?;
    let above = |sample: &Value| sample.as_f64().filter(|ns| ns.is_finite() && 0.0 < *ns);
    let ns = samples.iter().map(above).collect::<Option<Vec<f64>>>();
    let ns = ns.ok_or("it told samples_ns that are no times above 0")?;
    if ns.len() != times {
        return Err(format!("it told {} samples_ns, expected {times}", ns.len()));
    }
    let clock = answer["clock"].as_str().and_then(Clock::named);
    let clock = clock.filter(|clock| *clock != Clock::Host).ok_or_else(|| {
        let clocks = Clock::ALL.iter().filter(|clock| **clock != Clock::Host);
        let clocks: Vec<_> = clocks.map(|clock| format!("{:?}", clock.name())).collect();
        let clocks = clocks.join(" or ");
        format!("it told the clock {}, expected {clocks}", answer["clock"])
    })?;
    Ok(Clocked { ns, clock })
}

impl Asking {
    /// Asks with the inputs, and takes the outputs.
    fn ask(&mut self, asked: Value, memory: &mut Memory) -> Result<Value, Fault> {
        let most: usize = memory.outputs.iter().map(|block| block.layout.size()).sum();
        let inputs = memory.inputs.iter().map(|block| (block.layout.name, Tensor(block)));
        let inputs = safetensors::serialize(inputs, None)
            .map_err(|e| Fault::Refused(format!("inputs: {e}")))?;
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let (answer, outputs) = running.ask(asked, &inputs, most as u64 + (1 << 16))?;
        take(&outputs, memory).map_err(Fault::Died)?;
        let changed: Vec<&str> =
            answer["changed"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        if !changed.is_empty() {
            memory.confessed = Some(format!("input {} was changed", changed.join(", ")));
        }
        Ok(answer)
    }
}

fn request(call: &str, problem: &Problem, memory: &Memory) -> Value {
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
        "karat": ABI, "call": call, "op": op, "spec": spec, "case": case, "dtype": dtype.name(),
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
            // Unfit is an answer to `hello`; elsewhere no outputs come of it.
            Some("ok" | "unfit") => Ok((header, payload)),
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
