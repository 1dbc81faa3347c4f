//! The device: compiling, loading, memory and launches.
//!
//! libnvrtc and libcuda are loaded when they are first needed; `cudarc` panics where they are not, so
//! everything here asks before.
#![expect(unsafe_code, reason = "the compiler's and the driver's interfaces are C")]

use std::{
    ffi::{CString, c_void},
    fmt, fs,
    path::Path,
    ptr,
    sync::Arc,
};

use cudarc::{
    driver::{
        CudaContext, CudaGraph, CudaSlice, CudaStream, DevicePtr, DriverError,
        result::{self, module},
        sys,
    },
    nvrtc,
};
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

/// Why something did not work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Error {
    /// This machine does not have what it takes.
    Absent(String),
    /// The compiler's log.
    Compile(String),
    /// What the driver says.
    Driver(String),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Error::Absent(why) | Error::Compile(why) | Error::Driver(why)) = self;
        f.write_str(why)
    }
}

impl std::error::Error for Error {}

impl From<DriverError> for Error {
    fn from(error: DriverError) -> Error {
        let text = error.error_string().ok().map(|text| text.to_string_lossy().into_owned());
        Error::Driver(
            text.map_or(format!("{:?}", error.0), |text| format!("{:?}: {text}", error.0)),
        )
    }
}

/// Where there is no device, source is compiled for this one.
pub(crate) const TARGET: &str = "sm_90a";

/// Machine code, and what the compiler said of it.
pub(crate) struct Compiled {
    pub(crate) cubin: Vec<u8>,
    pub(crate) log: String,
}

/// Loads the compiler from a folder where the system does not look.
pub(crate) fn open_compiler(folder: &Path) -> Result<(), Error> {
    let told = |why: String| Error::Absent(format!("{}: {why}", folder.display()));
    let names = fs::read_dir(folder).map_err(|e| told(e.to_string()))?;
    let mut names: Vec<String> =
        names.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    names.sort();
    // The compiler asks for the second part of itself by name, and finds it where it is loaded already.
    for wanted in ["libnvrtc-builtins.so", "libnvrtc.so"] {
        let name = names.iter().find(|name| name.starts_with(wanted));
        let name = name.ok_or_else(|| told(format!("no {wanted} in it")))?;
        // SAFETY: the initialisers are NVIDIA's.
        let library = unsafe { Library::open(Some(folder.join(name)), RTLD_NOW | RTLD_GLOBAL) };
        // Loaded for good.
        std::mem::forget(library.map_err(|e| told(e.to_string()))?);
    }
    Ok(())
}

/// The version of the compiler, as the driver tells its own: 13000 is 13.0.
pub(crate) fn compiler_version() -> Result<i32, Error> {
    // SAFETY: only looks whether the library loads; its initialisers are NVIDIA's.
    if !unsafe { nvrtc::sys::is_culib_present() } {
        return Err(no_compiler());
    }
    let (mut major, mut minor) = (0, 0);
    // SAFETY: both places can be written.
    let told = unsafe { nvrtc::sys::nvrtcVersion(&raw mut major, &raw mut minor) };
    told.result().map_err(|error| Error::Compile(format!("nvrtc: {error}")))?;
    Ok(1000 * major + 10 * minor)
}

/// The newest version of CUDA that the driver runs: 13000 is 13.0.
pub(crate) fn driver_version() -> Result<i32, Error> {
    // SAFETY: only looks whether the library loads; its initialisers are NVIDIA's.
    if !unsafe { sys::is_culib_present() } {
        return Err(no_driver());
    }
    let mut version = 0;
    // SAFETY: `version` is there to be written.
    unsafe { sys::cuDriverGetVersion(&raw mut version) }.result()?;
    Ok(version)
}

fn no_driver() -> Error {
    Error::Absent("no CUDA driver: libcuda is not found".to_owned())
}

fn no_compiler() -> Error {
    let install = "pip install nvidia-cuda-nvrtc, and --nvrtc with the folder of its libnvrtc";
    Error::Absent(format!("libnvrtc is not found ({install})"))
}

/// Compiles CUDA C++ to machine code of a real target (`sm_90a`; a virtual one, `compute_90a`, would
/// hide what the assembler has to say). `name` is the file as messages name it.
pub(crate) fn compile(text: &str, name: &str, options: &[String]) -> Result<Compiled, Error> {
    let program = Program::new(text, name)?;
    // SAFETY: the program was created above and is destroyed when it is dropped.
    let compiled = unsafe { nvrtc::result::compile_program(program.0, options) };
    if let Err(error) = compiled {
        return Err(Error::Compile(program.log().unwrap_or_else(|| format!("nvrtc: {error}"))));
    }
    let cubin = program.cubin().map_err(|error| Error::Compile(format!("nvrtc: {error}")))?;
    Ok(Compiled { cubin, log: program.log().unwrap_or_default() })
}

/// A program of the compiler.
struct Program(nvrtc::sys::nvrtcProgram);

impl Program {
    fn new(text: &str, name: &str) -> Result<Program, Error> {
        // SAFETY: only looks whether the library loads; its initialisers are NVIDIA's.
        if !unsafe { nvrtc::sys::is_culib_present() } {
            return Err(no_compiler());
        }
        let zero = |what: &str| Error::Compile(format!("{name}: {what} holds a zero byte"));
        let text = CString::new(text).map_err(|_| zero("it"))?;
        let name = CString::new(name).map_err(|_| zero("its name"))?;
        let program = nvrtc::result::create_program(&text, Some(&name));
        program.map(Program).map_err(|error| Error::Compile(format!("nvrtc: {error}")))
    }

    fn log(&self) -> Option<String> {
        // SAFETY: the program is alive.
        let log = unsafe { nvrtc::result::get_program_log(self.0) }.ok()?;
        let bytes: Vec<u8> = log.into_iter().map(|c| c as u8).take_while(|&c| c != 0).collect();
        let log = String::from_utf8_lossy(&bytes).trim_end().to_owned();
        (!log.is_empty()).then_some(log)
    }

    fn cubin(&self) -> Result<Vec<u8>, nvrtc::result::NvrtcError> {
        let mut size = 0;
        // SAFETY: the program is alive, and `size` is there to be written.
        unsafe { nvrtc::sys::nvrtcGetCUBINSize(self.0, &raw mut size) }.result()?;
        let mut cubin = vec![0_u8; size];
        // SAFETY: as above; there is room for what it said.
        unsafe { nvrtc::sys::nvrtcGetCUBIN(self.0, cubin.as_mut_ptr().cast()) }.result()?;
        Ok(cubin)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: created in `new`, destroyed nowhere else.
        let _ = unsafe { nvrtc::result::destroy_program(self.0) };
    }
}

/// The least version of CUDA that a driver must run for [`Device::fresh`].
pub(crate) const LEAST: i32 = 12_050;

/// A GPU and a stream of work on it.
#[derive(Debug)]
pub(crate) struct Device {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
}

impl Device {
    /// The first one.
    pub(crate) fn first() -> Result<Device, Error> {
        // SAFETY: only looks whether the library loads; its initialisers are NVIDIA's.
        if !unsafe { sys::is_culib_present() } {
            return Err(no_driver());
        }
        let none = |error| match Error::from(error) {
            Error::Driver(text) => Error::Absent(format!("the CUDA driver has no device: {text}")),
            other => other,
        };
        let context = CudaContext::new(0).map_err(none)?;
        let stream = context.new_stream().map_err(none)?;
        Ok(Device { context, stream })
    }

    /// The first one, in a context that nobody else in this process has. The driver is at least
    /// [`LEAST`].
    pub(crate) fn fresh() -> Result<Device, Error> {
        let context = CudaContext::new_non_primary(0, 0)?;
        // SAFETY: all work goes through one stream.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream()?;
        Ok(Device { context, stream })
    }

    /// How many there are.
    pub(crate) fn count() -> Result<usize, Error> {
        // SAFETY: only looks whether the library loads; its initialisers are NVIDIA's.
        if !unsafe { sys::is_culib_present() } {
            return Err(no_driver());
        }
        result::init()?;
        Ok(result::device::get_count()? as usize)
    }

    /// One of several, in the context that the runtime of CUDA takes as well: NCCL is written on that.
    pub(crate) fn one_of_several(ordinal: usize) -> Result<Device, Error> {
        let context = CudaContext::new(ordinal)?;
        // SAFETY: all work goes through one stream.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream()?;
        Ok(Device { context, stream })
    }

    /// Makes it the device of this thread.
    pub(crate) fn bind(&self) -> Result<(), Error> {
        Ok(self.context.bind_to_thread()?)
    }

    /// Its stream, as the runtime of CUDA knows it.
    pub(crate) fn queue(&self) -> *mut c_void {
        self.stream.cu_stream().cast()
    }

    /// What it calls itself.
    pub(crate) fn name(&self) -> Result<String, Error> {
        Ok(self.context.name()?)
    }

    /// Its memory, in bytes.
    pub(crate) fn memory(&self) -> Result<u64, Error> {
        Ok(self.context.total_mem()? as u64)
    }

    /// How many multiprocessors it has.
    pub(crate) fn multiprocessors(&self) -> Result<u32, Error> {
        let what = sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        Ok(self.context.attribute(what)? as u32)
    }

    /// Bytes that its largest cache holds.
    pub(crate) fn cached(&self) -> Result<usize, Error> {
        let what = sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE;
        Ok(self.context.attribute(what)? as usize)
    }

    /// Nanoseconds between an event before some work and one behind it, when all of it is done.
    pub(crate) fn elapsed(
        &self,
        work: &mut dyn FnMut() -> Result<(), Error>,
    ) -> Result<f64, Error> {
        let event = || self.stream.record_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT));
        let before = event()?;
        work()?;
        Ok(f64::from(before.elapsed_ms(&event()?)?) * 1e6)
    }

    /// What the compiler calls it: `sm_90a`. From Hopper on the `a` opens what is of this
    /// architecture alone (wgmma, TMA).
    pub(crate) fn target(&self) -> Result<String, Error> {
        let (major, minor) = self.context.compute_capability()?;
        Ok(format!("sm_{major}{minor}{}", if 9 <= major { "a" } else { "" }))
    }

    /// Loads PTX or a cubin.
    pub(crate) fn load(self: &Arc<Device>, image: &[u8]) -> Result<Arc<Module>, Error> {
        self.context.bind_to_thread()?;
        // PTX ends with a zero.
        let image = [image, &[0]].concat();
        // SAFETY: the image outlives the call. That it is one, its author vouches for.
        let module = unsafe { module::load_data(image.as_ptr().cast()) }?;
        Ok(Arc::new(Module { module, device: self.clone() }))
    }

    /// Room for so many bytes; what is in it is nothing yet.
    pub(crate) fn room(&self, bytes: usize) -> Result<Buffer, Error> {
        let there = self.stream.alloc_zeros(bytes.max(1))?;
        let address = there.device_ptr(&self.stream).0;
        Ok(Buffer { address, len: bytes.max(1), there: Some(there) })
    }

    /// Copies to the device.
    pub(crate) fn put(&self, bytes: &[u8], to: &mut Buffer) -> Result<(), Error> {
        Ok(self.stream.memcpy_htod(bytes, to.there_mut()?)?)
    }

    /// Waits for the device, and copies back.
    pub(crate) fn get(&self, from: &Buffer, to: &mut [u8]) -> Result<(), Error> {
        if to.is_empty() {
            return Ok(());
        }
        let view = from.there()?.slice(0..to.len());
        self.stream.memcpy_dtoh(&view, to)?;
        self.wait()
    }

    /// Bytes of its memory that nobody has.
    pub(crate) fn free(&self) -> Result<u64, Error> {
        Ok(self.context.mem_get_info()?.0 as u64)
    }

    /// Copies to some bytes of a buffer.
    pub(crate) fn put_at(&self, bytes: &[u8], to: &mut Buffer, at: usize) -> Result<(), Error> {
        if bytes.is_empty() {
            return Ok(());
        }
        Ok(self.stream.memcpy_htod(bytes, &mut to.there_mut()?.slice_mut(at..at + bytes.len()))?)
    }

    /// Puts a copy of so many bytes of one buffer into another.
    pub(crate) fn copy(
        &self,
        (from, start): (&Buffer, usize),
        (to, at): (&mut Buffer, usize),
        bytes: usize,
    ) -> Result<(), Error> {
        if bytes == 0 {
            return Ok(());
        }
        let from = from.there()?.slice(start..start + bytes);
        Ok(self.stream.memcpy_dtod(&from, &mut to.there_mut()?.slice_mut(at..at + bytes))?)
    }

    /// Makes every byte zero.
    pub(crate) fn clear(&self, buffer: &mut Buffer) -> Result<(), Error> {
        Ok(self.stream.memset_zeros(buffer.there_mut()?)?)
    }

    /// What `work` puts into the stream, to be done as often as is wished. Nothing of it may wait, copy
    /// from the host or make room.
    pub(crate) fn capture(&self, work: impl FnOnce() -> Result<(), Error>) -> Result<Graph, Error> {
        let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.stream.begin_capture(mode)?;
        let done = work();
        let graph = self.stream.end_capture(sys::CUgraphInstantiate_flags(0));
        done?;
        let nothing = || Error::Driver("a graph of nothing".to_owned());
        Ok(Graph(graph?.ok_or_else(nothing)?))
    }

    /// Waits until all work is done.
    pub(crate) fn wait(&self) -> Result<(), Error> {
        Ok(self.stream.synchronize()?)
    }

    /// The address of a buffer.
    #[expect(clippy::unused_self, reason = "whose memory it is")]
    pub(crate) fn address(&self, buffer: &Buffer) -> u64 {
        buffer.address()
    }
}

/// Memory of the device.
#[derive(Debug)]
pub(crate) struct Buffer {
    address: u64,
    len: usize,
    there: Option<CudaSlice<u8>>,
}

impl Buffer {
    /// An address and a size without memory: what is launched with it can be looked at, and nothing else.
    #[cfg(test)]
    pub(crate) fn on_paper(address: u64, len: usize) -> Buffer {
        Buffer { address, len, there: None }
    }

    /// Some bytes of it, which are there as long as it is.
    pub(crate) fn part(&self, from: usize, len: usize) -> Buffer {
        assert!(from + len <= self.len, "a part of {len} from {from} on, of {}", self.len);
        Buffer { address: self.address + from as u64, len, there: None }
    }

    /// Bytes.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Where it is.
    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    fn there(&self) -> Result<&CudaSlice<u8>, Error> {
        self.there.as_ref().ok_or_else(nothing_there)
    }

    fn there_mut(&mut self) -> Result<&mut CudaSlice<u8>, Error> {
        self.there.as_mut().ok_or_else(nothing_there)
    }
}

fn nothing_there() -> Error {
    Error::Driver("a buffer without memory".to_owned())
}

/// Work that was captured.
pub(crate) struct Graph(CudaGraph);

// SAFETY: handles of the driver, which any thread may use, one at a time: whoever has a graph has it alone.
unsafe impl Send for Graph {}

impl Graph {
    /// Puts all of it into the stream that it was captured of.
    pub(crate) fn launch(&self) -> Result<(), Error> {
        Ok(self.0.launch()?)
    }
}

/// Loaded code.
#[derive(Debug)]
pub(crate) struct Module {
    module: sys::CUmodule,
    device: Arc<Device>,
}

// SAFETY: a handle of the driver, which may be used from any thread.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

impl Drop for Module {
    fn drop(&mut self) {
        // After a fault on the device nothing can be unloaded any more; the process is near its end.
        if self.device.context.bind_to_thread().is_ok() {
            // SAFETY: loaded in `Device::load`, unloaded nowhere else; functions of it keep it alive.
            let _ = unsafe { module::unload(self.module) };
        }
    }
}

impl Module {
    /// A kernel by its name.
    pub(crate) fn function(self: &Arc<Module>, name: &str) -> Result<Function, Error> {
        self.device.context.bind_to_thread()?;
        let text = CString::new(name).map_err(|_| Error::Driver("a zero byte".to_owned()))?;
        // SAFETY: the module is loaded.
        let function = unsafe { module::get_function(self.module, text) }?;
        Ok(Function { function, module: self.clone() })
    }
}

/// A kernel.
#[derive(Debug)]
pub(crate) struct Function {
    function: sys::CUfunction,
    module: Arc<Module>,
}

// SAFETY: a handle of the driver, which may be used from any thread.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

/// One argument.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Value {
    /// An address of the device, 0 for none.
    Address(u64),
    /// `int`.
    I32(i32),
    /// `long long`.
    I64(i64),
    /// `float`.
    F32(f32),
    /// `double`.
    F64(f64),
}

impl Value {
    /// Bytes that it takes.
    pub(crate) fn size(self) -> usize {
        match self {
            Value::I32(_) | Value::F32(_) => 4,
            Value::Address(_) | Value::I64(_) | Value::F64(_) => 8,
        }
    }

    fn place(&self) -> *mut c_void {
        let place: *const c_void = match self {
            Value::Address(x) => ptr::from_ref(x).cast(),
            Value::I32(x) => ptr::from_ref(x).cast(),
            Value::I64(x) => ptr::from_ref(x).cast(),
            Value::F32(x) => ptr::from_ref(x).cast(),
            Value::F64(x) => ptr::from_ref(x).cast(),
        };
        place.cast_mut()
    }
}

/// How many threads run, and how much memory a block of them shares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    /// Blocks.
    pub(crate) grid: [u32; 3],
    /// Threads of a block.
    pub(crate) block: [u32; 3],
    /// Bytes of dynamic shared memory.
    pub(crate) shared: u32,
    /// Whether it may start before what is before it in the stream has ended, for which it waits itself.
    pub(crate) early: bool,
}

impl Shape {
    /// Of a kernel of karat: threads of a block in a row. The assembler reads four numbers of shared memory
    /// at once, also where fewer are left.
    pub(crate) fn of(grid: [u32; 3], threads: u32, shared: u32) -> Shape {
        let shared = shared.next_multiple_of(16);
        Shape { grid, block: [threads, 1, 1], shared, early: false }
    }
}

/// More dynamic shared memory than this has to be asked for.
const SHARED: u32 = 48 << 10;

impl Function {
    /// Bytes that each parameter takes; `None` where the driver is too old to tell (before CUDA 12.4).
    pub(crate) fn parameters(&self) -> Option<Vec<usize>> {
        // A kernel has at most 32764 bytes of parameters.
        self.first_parameters(32_764)
    }

    /// The same of so many at the most: asking for one more is an error to whoever watches the driver.
    pub(crate) fn first_parameters(&self, most: usize) -> Option<Vec<usize>> {
        if driver_version().ok()? < 12_040 {
            return None;
        }
        let mut sizes = Vec::new();
        while sizes.len() < most {
            let (mut offset, mut size) = (0, 0);
            let at = sizes.len();
            // SAFETY: the function is of a module that it keeps loaded; both places can be written.
            let told = unsafe {
                sys::cuFuncGetParamInfo(self.function, at, &raw mut offset, &raw mut size)
            };
            if told.result().is_err() {
                break;
            }
            sizes.push(size);
        }
        Some(sizes)
    }

    /// Puts one run into the stream of the device.
    ///
    /// The values must be of the sizes that [`parameters`](Self::parameters) tells, and addresses must
    /// be of memory that lives until the device has been waited for.
    pub(crate) fn launch(&self, shape: Shape, values: &[Value]) -> Result<(), Error> {
        let device = &self.module.device;
        device.context.bind_to_thread()?;
        if SHARED < shape.shared {
            let what =
                sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            let bytes = shape.shared as i32;
            // SAFETY: the function is of a module that it keeps loaded.
            unsafe { result::function::set_function_attribute(self.function, what, bytes) }?;
        }
        let mut places: Vec<*mut c_void> = values.iter().map(Value::place).collect();
        let ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]) = (shape.grid, shape.block);
        let mut early = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: grid_x,
            gridDimY: grid_y,
            gridDimZ: grid_z,
            blockDimX: block_x,
            blockDimY: block_y,
            blockDimZ: block_z,
            sharedMemBytes: shape.shared,
            hStream: device.stream.cu_stream(),
            attrs: &raw mut early,
            numAttrs: u32::from(shape.early),
        };
        // SAFETY: the function is of a loaded module, and places point to values that outlive the call,
        // which copies them. What the kernel does with the addresses is foreign code's affair, and why
        // it runs in a process of its own.
        let launched = unsafe {
            sys::cuLaunchKernelEx(
                &raw const config,
                self.function,
                places.as_mut_ptr(),
                ptr::null_mut(),
            )
        };
        Ok(launched.result()?)
    }
}
