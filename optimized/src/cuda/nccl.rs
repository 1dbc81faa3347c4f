//! Several GPUs through NCCL, of which one call is used: what is gathered is added up by our own kernel, in the order of
//! the ranks, so that bits do not depend on how NCCL goes about it.
//!
//! The library is loaded when it is first needed, by the name that its packages have (`cudarc` asks for
//! `libnccl.so`, which they do not).
#![expect(unsafe_code, reason = "NCCL's interface is C")]

use std::{
    ffi::{CStr, c_char, c_int, c_void},
    ptr,
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use libloading::os::unix::Library;

use super::{
    device::{Buffer, Device, Error},
    peers::Peers,
};

type Comm = *mut c_void;

/// `ncclUint8`.
const BYTES: c_int = 1;

/// The calls.
struct Api {
    version: unsafe extern "C" fn(*mut c_int) -> c_int,
    error: unsafe extern "C" fn(c_int) -> *const c_char,
    init_all: unsafe extern "C" fn(*mut Comm, c_int, *const c_int) -> c_int,
    all_gather:
        unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, Comm, *mut c_void) -> c_int,
    abort: unsafe extern "C" fn(Comm) -> c_int,
    destroy: unsafe extern "C" fn(Comm) -> c_int,
    /// What they are of.
    _library: Library,
}

impl Api {
    fn open() -> Result<Api, Error> {
        let none = || {
            let install = "pip install nvidia-nccl-cu13, and LD_LIBRARY_PATH with the folder of its libnccl.so.2";
            Error::Absent(format!("libnccl is not found ({install})"))
        };
        // SAFETY: the initialisers are NVIDIA's.
        let open = |name: &str| unsafe { Library::new(name) }.ok();
        let library = ["libnccl.so.2", "libnccl.so"].into_iter().find_map(open);
        let library = library.ok_or_else(none)?;
        Ok(Api {
            version: call(&library, c"ncclGetVersion")?,
            error: call(&library, c"ncclGetErrorString")?,
            init_all: call(&library, c"ncclCommInitAll")?,
            all_gather: call(&library, c"ncclAllGather")?,
            abort: call(&library, c"ncclCommAbort")?,
            destroy: call(&library, c"ncclCommDestroy")?,
            _library: library,
        })
    }

    fn told(&self, code: c_int) -> Result<(), Error> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: every code has a text, which is static.
        let text = unsafe { (self.error)(code) };
        // SAFETY: as above.
        let text = unsafe { CStr::from_ptr(text) };
        Err(Error::Driver(format!("NCCL: {}", text.to_string_lossy())))
    }
}

/// A call by its name.
fn call<T: Copy>(library: &Library, name: &CStr) -> Result<T, Error> {
    // SAFETY: `Api` has the types that `nccl.h` of every 2.x gives to these names, and keeps the library.
    let found = unsafe { library.get::<T>(name.to_bytes_with_nul()) };
    let found = found.map_err(|e| Error::Absent(format!("libnccl: {e}")))?;
    Ok(*found)
}

fn api() -> Result<&'static Api, Error> {
    static API: OnceLock<Result<Api, Error>> = OnceLock::new();
    API.get_or_init(Api::open).as_ref().map_err(Clone::clone)
}

/// Its version.
pub(super) fn version() -> Result<String, Error> {
    let api = api()?;
    let mut version = 0;
    // SAFETY: `version` is there to be written.
    api.told(unsafe { (api.version)(&raw mut version) })?;
    Ok(format!("{}.{}.{}", version / 10_000, version % 10_000 / 100, version % 100))
}

/// One rank of several.
pub(super) struct Rank {
    api: &'static Api,
    ranks: usize,
    /// None once the ranks have been parted.
    comm: Mutex<Option<Handle>>,
}

struct Handle(Comm);

// SAFETY: a handle that any thread may use, one at a time: it stands behind a lock.
unsafe impl Send for Handle {}

/// Joins the first devices of this machine, so many.
pub(super) fn join(ranks: usize) -> Result<Vec<Arc<Rank>>, Error> {
    let api = api()?;
    let mut comms: Vec<Comm> = vec![ptr::null_mut(); ranks];
    // SAFETY: there is room for as many handles; without a list the devices are the first ones.
    api.told(unsafe { (api.init_all)(comms.as_mut_ptr(), ranks as c_int, ptr::null()) })?;
    let rank = |comm| Arc::new(Rank { api, ranks, comm: Mutex::new(Some(Handle(comm))) });
    Ok(comms.into_iter().map(rank).collect())
}

impl Rank {
    /// Ends what waits for a rank that does not come; nothing is gathered any more.
    pub(super) fn part(&self) {
        let comm = self.comm.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(Handle(comm)) = comm {
            // SAFETY: it was made in `join` and is given back once.
            let _ = unsafe { (self.api.abort)(comm) };
        }
    }
}

impl Peers for Rank {
    fn gather(
        &self,
        device: &Device,
        from: &Buffer,
        to: &Buffer,
        bytes: usize,
    ) -> Result<(), Error> {
        if bytes == 0 {
            return Ok(());
        }
        assert!(
            bytes <= from.len() && self.ranks * bytes <= to.len(),
            "{bytes} of {} bytes gathered in {}",
            from.len(),
            to.len()
        );
        device.bind()?;
        let comm = self.comm.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(Handle(comm)) = *comm else {
            return Err(Error::Driver("the GPUs were parted".to_owned()));
        };
        let (from, to) = (from.address() as *const c_void, to.address() as *mut c_void);
        // SAFETY: both are memory of the device of this rank, of the sizes that were looked at, and live until it has
        // been waited for; the stream is the device's.
        let told = unsafe { (self.api.all_gather)(from, to, bytes, BYTES, comm, device.queue()) };
        self.api.told(told)
    }
}

impl Drop for Rank {
    fn drop(&mut self) {
        let comm = self.comm.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(Handle(comm)) = comm {
            // SAFETY: it was made in `join` and is given back once.
            let _ = unsafe { (self.api.destroy)(comm) };
        }
    }
}
