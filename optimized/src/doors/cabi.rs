//! The shared-library door: a function per op behind a versioned C struct. See `karat.h`.
#![expect(unsafe_code, reason = "symbols of a shared library are looked up and called")]

use std::{
    collections::BTreeMap,
    ffi::{CStr, CString, c_char, c_void},
    path::Path,
    ptr,
    sync::Arc,
};

use golden::Dtype;
use libloading::Library as Loaded;

use super::{
    ABI, Door, Fault, Memory, Problem, Session, World,
    block::{Block, Layout},
};

type Abi = unsafe extern "C" fn() -> u32;
type Function = unsafe extern "C" fn(*const Call) -> i32;
type Query = unsafe extern "C" fn(*const Call) -> u64;

/// `karat_tensor`.
#[repr(C)]
struct Tensor {
    name: *const c_char,
    data: *mut c_void,
    dtype: i32,
    rank: i32,
    shape: *const i64,
    strides: *const i64,
}

/// `karat_number`.
#[repr(C)]
struct Number {
    name: *const c_char,
    value: f64,
}

/// `karat_call`.
#[repr(C)]
struct Call {
    abi: u32,
    size: u32,
    op: *const c_char,
    stream: *mut c_void,
    workspace: *mut c_void,
    workspace_bytes: u64,
    inputs: *const Tensor,
    outputs: *const Tensor,
    scalars: *const Number,
    sizes: *const Number,
    n_inputs: u32,
    n_outputs: u32,
    n_scalars: u32,
    n_sizes: u32,
    message: *mut c_char,
    message_bytes: u64,
}

/// Room for what a kernel says when it fails.
const MESSAGE: usize = 512;

/// A library that was loaded and has a symbol for every op.
pub(super) struct Library {
    functions: BTreeMap<String, Entry>,
    /// The most that a workspace may take.
    memory: u64,
    // Last, so that it is dropped after everything that points into it.
    code: Arc<Loaded>,
}

#[derive(Clone, Copy)]
struct Entry {
    run: Function,
    workspace: Option<Query>,
}

impl Library {
    /// Loads it and looks every symbol up.
    pub(super) fn open(
        file: &Path,
        symbols: &BTreeMap<String, String>,
        implements: &[String],
        world: &World,
    ) -> Result<Library, Fault> {
        let told = |why: String| Fault::Refused(format!("{}: {why}", file.display()));
        let file_absolute = file.canonicalize().map_err(|e| told(e.to_string()))?;
        // SAFETY: its initialisers are foreign code; this process exists to run foreign code.
        let library = unsafe { Loaded::new(&file_absolute) };
        let library = library.map_err(|e| told(one_line(&e)))?;
        // SAFETY: `karat.h` gives this symbol this type.
        let abi = unsafe { library.get::<Abi>(b"karat_abi\0") };
        let abi = *abi.map_err(|_| told("no symbol karat_abi (see karat.h)".to_owned()))?;
        // SAFETY: as above; it takes nothing.
        let abi = unsafe { abi() };
        if abi != ABI {
            return Err(told(format!("karat_abi says {abi}, expected {ABI}")));
        }
        let mut functions = BTreeMap::new();
        for op in implements {
            let symbol = symbols.get(op).cloned().unwrap_or_else(|| format!("karat_{op}"));
            // SAFETY: `karat.h` gives functions of ops this type.
            let run = unsafe { library.get::<Function>(symbol.as_bytes()) };
            let run = *run.map_err(|_| told(format!("no symbol {symbol} for {op}")))?;
            // SAFETY: `karat.h` gives workspace queries this type.
            let workspace =
                unsafe { library.get::<Query>(format!("{symbol}_workspace").as_bytes()) };
            let workspace = workspace.ok().map(|symbol| *symbol);
            functions.insert(op.clone(), Entry { run, workspace });
        }
        Ok(Library { functions, memory: world.memory, code: Arc::new(library) })
    }
}

fn one_line(error: &libloading::Error) -> String {
    let source = std::error::Error::source(error).map_or(String::new(), |e| format!(": {e}"));
    format!("{error}{source}").replace('\n', " ")
}

impl Door for Library {
    fn begin(&self, problem: &Problem, memory: &mut Memory) -> Result<Box<dyn Session>, Fault> {
        let entry = *self
            .functions
            .get(problem.op)
            .ok_or_else(|| Fault::Refused(format!("{} is not in implements", problem.op)))?;
        if let Some(query) = entry.workspace {
            let mut words = Words::new(problem, memory);
            let call = words.call(memory);
            // SAFETY: `call` and everything it points to outlive the call, and the struct is as
            // `karat.h` says.
            let bytes = unsafe { query(&raw const call) };
            if self.memory < bytes {
                let most = self.memory;
                return Err(Fault::Died(format!(
                    "asks for a workspace of {bytes} bytes, at most {most}"
                )));
            }
            let shape = vec![bytes as usize];
            memory.workspace =
                Some(Block::new(Layout { name: "workspace", dtype: Dtype::U8, shape }));
        }
        Ok(Box::new(Calling { entry, _library: self.code.clone() }))
    }
}

struct Calling {
    entry: Entry,
    _library: Arc<Loaded>,
}

impl Session for Calling {
    fn run(&mut self, problem: &Problem, memory: &mut Memory) -> Result<(), Fault> {
        let mut words = Words::new(problem, memory);
        let call = words.call(memory);
        // SAFETY: `call` and everything it points to outlive the call, tensors are as large as their
        // shapes say, and the struct is as `karat.h` says. What the kernel does beyond that is why it
        // runs in a process of its own.
        let status = unsafe { (self.entry.run)(&raw const call) };
        if status == 0 {
            return Ok(());
        }
        let message = CStr::from_bytes_until_nul(&words.message);
        let message =
            message.map_or(String::new(), |text| text.to_string_lossy().replace('\n', " "));
        let message = if message.is_empty() { message } else { format!(": {message}") };
        Err(Fault::Died(format!("it returned status {status}{message}")))
    }
}

/// Everything that a [`Call`] points to, apart from the tensors themselves.
struct Words {
    op: CString,
    names: Vec<CString>,
    shapes: Vec<Vec<i64>>,
    strides: Vec<Vec<i64>>,
    inputs: Vec<Tensor>,
    outputs: Vec<Tensor>,
    scalars: Vec<Number>,
    sizes: Vec<Number>,
    message: [u8; MESSAGE],
}

fn c(text: &str) -> CString {
    CString::new(text).unwrap_or_default()
}

impl Words {
    fn new(problem: &Problem, memory: &Memory) -> Words {
        let layouts = || memory.inputs.iter().chain(&memory.outputs).map(|block| &block.layout);
        let wide = |shape: &[usize]| shape.iter().map(|&size| size as i64).collect();
        let strides = |layout: &Layout| {
            let mut strides = vec![1_i64; layout.shape.len()];
            for at in (1..layout.shape.len()).rev() {
                strides[at - 1] = strides[at] * layout.shape[at] as i64;
            }
            strides
        };
        let names = layouts().map(|layout| layout.name);
        let names = names.chain(problem.scalars.iter().map(|(name, _)| *name));
        let names = names.chain(problem.sizes.iter().map(|(name, _)| *name));
        let mut words = Words {
            op: c(problem.op),
            names: names.map(c).collect(),
            shapes: layouts().map(|layout| wide(&layout.shape)).collect(),
            strides: layouts().map(strides).collect(),
            inputs: Vec::new(),
            outputs: Vec::new(),
            scalars: Vec::new(),
            sizes: Vec::new(),
            message: [0; MESSAGE],
        };
        let first = memory.inputs.len() + memory.outputs.len();
        let numbers = problem.scalars.iter().map(|(_, value)| *value);
        let numbers = numbers.chain(problem.sizes.iter().map(|&(_, size)| size as f64));
        let mut numbers: Vec<Number> = words.names[first..]
            .iter()
            .zip(numbers)
            .map(|(name, value)| Number { name: name.as_ptr(), value })
            .collect();
        words.sizes = numbers.split_off(problem.scalars.len());
        words.scalars = numbers;
        words
    }

    /// The struct, pointing into `self` and `memory`.
    fn call(&mut self, memory: &mut Memory) -> Call {
        let Memory { inputs, outputs, workspace, .. } = memory;
        let tensor = |(at, block): (usize, &mut Block)| Tensor {
            name: self.names[at].as_ptr(),
            data: block.data_mut().as_mut_ptr().cast(),
            dtype: match block.layout.dtype {
                Dtype::F64 => 0,
                Dtype::F32 => 1,
                Dtype::F16 => 2,
                Dtype::Bf16 => 3,
                Dtype::I64 => 4,
                Dtype::U8 | Dtype::Fp8 => 5,
            },
            rank: block.layout.shape.len() as i32,
            shape: self.shapes[at].as_ptr(),
            strides: self.strides[at].as_ptr(),
        };
        let n = inputs.len();
        self.inputs = inputs.iter_mut().enumerate().map(tensor).collect();
        self.outputs =
            outputs.iter_mut().enumerate().map(|(at, block)| tensor((n + at, block))).collect();
        let (address, bytes) = match workspace {
            None => (ptr::null_mut(), 0),
            Some(block) => (block.data_mut().as_mut_ptr().cast(), block.layout.size() as u64),
        };
        Call {
            abi: ABI,
            size: size_of::<Call>() as u32,
            op: self.op.as_ptr(),
            stream: ptr::null_mut(),
            workspace: address,
            workspace_bytes: bytes,
            inputs: self.inputs.as_ptr(),
            outputs: self.outputs.as_ptr(),
            scalars: self.scalars.as_ptr(),
            sizes: self.sizes.as_ptr(),
            n_inputs: self.inputs.len() as u32,
            n_outputs: self.outputs.len() as u32,
            n_scalars: self.scalars.len() as u32,
            n_sizes: self.sizes.len() as u32,
            message: self.message.as_mut_ptr().cast(),
            message_bytes: MESSAGE as u64,
        }
    }
}
