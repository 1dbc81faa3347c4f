//! A model on several GPUs: a thread for each, with a device, a share of the weights and of the states of its own.
//!
//! All do the same steps, each its share of them. What is the same everywhere is answered by the first; logits stand
//! side by side, and so do heads of states. A fault of one would leave the others waiting for it for ever: they are
//! parted, and the engine is at its end.

use std::{
    any::Any,
    panic::{self, AssertUnwindSafe},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, RecvTimeoutError, Sender},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use golden::{
    Claims, Config, Engine, Error, Plan, Weights,
    engine::{INTERRUPTED, LinearState, Listener, Rows, Snapshot, Step, Traffic, Want},
    split::{Share, Split},
    weights::Part,
};
use ndarray::{Array2, Array3, Axis, concatenate};

use super::{Format, Model, Unfit, memory, on};
use crate::cuda::{
    device::{self, Device},
    engine::Stored,
    gpu::{self, Context},
    nccl,
};

/// How long others may take to end as well once one has failed.
const GRACE: Duration = Duration::from_secs(5);

/// The engine.
pub(super) struct Ranks {
    seats: Vec<Seat>,
    peers: Vec<Arc<nccl::Rank>>,
    shares: Vec<Share>,
    config: Config,
    name: String,
    plan: Plan,
    claims: Claims,
    falls_back: Option<String>,
    has_mtp: bool,
    listener: Option<Listener>,
    /// What parted them.
    ended: OnceLock<String>,
}

/// A rank's thread, and what it is to do.
struct Seat {
    work: Option<Sender<Work>>,
    thread: Option<JoinHandle<()>>,
}

type Work = Box<dyn FnOnce(&mut Model) + Send>;

/// Models on several GPUs take turns. What is gathered waits on each GPU for the others; whoever gives memory back or
/// loads a kernel waits for all that a GPU does: two models that do so at once wait for one another.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The devices of so many ranks.
fn devices(gpus: usize) -> Result<Vec<Device>, Error> {
    let there = Device::count()?;
    if there < gpus {
        return Err(Unfit(format!("{gpus} GPUs are asked for, this machine has {there}")).into());
    }
    let all: Vec<_> =
        (0..gpus).map(Device::one_of_several).collect::<Result<_, device::Error>>()?;
    let kinds: Vec<_> = all.iter().map(Device::target).collect::<Result<_, _>>()?;
    match kinds.iter().position(|kind| *kind != kinds[0]) {
        None => Ok(all),
        Some(odd) => Err(Unfit(format!(
            "GPUs of one kind are expected: the first is {}, number {odd} is {}",
            kinds[0], kinds[odd]
        ))
        .into()),
    }
}

/// Bytes that nobody has on the GPU with the least, of so many.
pub(super) fn free(gpus: usize) -> Result<u64, Error> {
    let mut least = u64::MAX;
    for device in devices(gpus)? {
        least = least.min(device.free()?);
    }
    Ok(least)
}

impl Ranks {
    /// Loads every share.
    pub(super) fn load(
        weights: &dyn Weights,
        split: &Split,
        kinds: (Format, Stored),
        tell: &mut dyn FnMut(u64, u64) -> bool,
    ) -> Result<Ranks, Error> {
        let turn = turn();
        let shares = split.shares();
        let devices = devices(shares.len())?;
        let unfit = |error| match error {
            device::Error::Absent(why) => Error::from(Unfit(why)),
            other => other.into(),
        };
        let peers = nccl::join(shares.len()).map_err(unfit)?;
        let mut contexts = Vec::new();
        for (device, rank) in devices.into_iter().zip(&peers) {
            contexts.push(Context::of(device, rank.clone())?);
        }
        let loaded = load(weights, &shares, kinds, contexts, tell)?;
        let first = &loaded[0].1;
        let (plan, claims, falls_back) = (first.plan(), first.claims(), first.falls_back());
        let name = format!("{}-x{}", first.name(), shares.len());
        let has_mtp = first.has_mtp();
        let seats = loaded.into_iter().map(|(context, model)| seat(context, model)).collect();
        let ranks = Ranks {
            seats,
            peers,
            shares,
            config: weights.config().clone(),
            name,
            plan,
            claims,
            falls_back,
            has_mtp,
            listener: None,
            ended: OnceLock::new(),
        };
        drop(turn);
        // Ways to one another are found before anything waits for them.
        ranks.each(|model| {
            model.on(|_, context| {
                let device = context.device.clone();
                let (from, to) = (device.room(1 << 10)?, device.room(1 << 20)?);
                context.peers.gather(&device, &from, &to, 1 << 10)?;
                Ok(device.wait()?)
            })
        })?;
        Ok(ranks)
    }

    /// Does some work on every rank at once: what each comes to.
    fn each<T: Send + 'static>(
        &self,
        work: impl Fn(&mut Model) -> Result<T, Error> + Send + Sync + 'static,
    ) -> Result<Vec<T>, Error> {
        if let Some(why) = self.ended.get() {
            return Err(why.clone().into());
        }
        let _turn = turn();
        let work = Arc::new(work);
        let (tell, told) = mpsc::channel();
        for (rank, seat) in self.seats.iter().enumerate() {
            let (work, tell) = (work.clone(), tell.clone());
            let work: Work = Box::new(move |model| {
                let done = panic::catch_unwind(AssertUnwindSafe(|| work(model)));
                let done = done.unwrap_or_else(|fault| Err(said(&*fault).into()));
                // Who asked may have gone.
                let _ = tell.send((rank, done));
            });
            let sent = seat.work.as_ref().map(|seat| seat.send(work));
            sent.and_then(Result::ok).ok_or("the thread of a GPU has ended")?;
        }
        drop(tell);
        let mut all: Vec<Option<T>> = self.seats.iter().map(|_| None).collect();
        let mut failed = None;
        loop {
            let next = match failed {
                None => told.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(_) => told.recv_timeout(GRACE),
            };
            match next {
                Ok((rank, Ok(done))) => all[rank] = Some(done),
                Ok((_, Err(error))) => failed = failed.or(Some(error)),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    let why = failed.as_ref().map_or(String::new(), ToString::to_string);
                    // Who does not even end then is left to itself.
                    if self.ended.set(format!("the GPUs were parted by a fault: {why}")).is_err() {
                        break;
                    }
                    self.peers.iter().for_each(|peer| peer.part());
                }
            }
        }
        match failed {
            None => Ok(all.into_iter().flatten().collect()),
            Some(error) => Err(error),
        }
    }

    /// The same, with the first rank's alone.
    fn first<T: Send + 'static>(
        &self,
        work: impl Fn(&mut Model) -> Result<T, Error> + Send + Sync + 'static,
    ) -> Result<T, Error> {
        Ok(self.each(work)?.into_iter().next().ok_or("no rank")?)
    }

    /// Lengths that all ranks have.
    fn lengths_of(&self, of: fn(&Model) -> Vec<usize>) -> Vec<usize> {
        self.first(move |model| Ok(of(model))).unwrap_or_default()
    }
}

/// Loads every share on its own thread.
fn load(
    weights: &dyn Weights,
    shares: &[Share],
    (format, kept): (Format, Stored),
    contexts: Vec<Context>,
    tell: &mut dyn FnMut(u64, u64) -> bool,
) -> Result<Vec<(Context, Model)>, Error> {
    let mut needs = Vec::new();
    for share in shares {
        let part = Part::new(weights, share.clone());
        needs.push(memory::weights(&part, share, format)?);
    }
    let all = needs.iter().sum();
    let goes_on = AtomicBool::new(true);
    let goes_on = &goes_on;
    thread::scope(|scope| {
        let (told, hears) = mpsc::channel();
        let mut threads = Vec::new();
        for ((context, share), needs) in contexts.into_iter().zip(shares).zip(needs) {
            let told = told.clone();
            threads.push(scope.spawn(move || {
                let part = Part::new(weights, share.clone());
                gpu::take(context);
                let loaded = on(|context| {
                    memory::fits_weights(&context.device, needs)?;
                    let mut tell = |bytes| {
                        let heard = told.send(bytes).is_ok();
                        heard && goes_on.load(Ordering::Relaxed)
                    };
                    Model::load(&part, (share, format, kept), context, &mut tell)
                });
                if loaded.is_err() {
                    goes_on.store(false, Ordering::Relaxed);
                }
                let context = gpu::give().ok_or("a thread without its device")?;
                Ok::<_, Error>((context, loaded?))
            }));
        }
        drop(told);
        let mut done = 0;
        for bytes in hears {
            done += bytes;
            if !tell(done, all) {
                goes_on.store(false, Ordering::Relaxed);
            }
        }
        let ended = threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|fault| Err(Error::from(said(&*fault)))));
        let ended: Vec<Result<_, Error>> = ended.collect();
        // Who failed first made others stop.
        let (loaded, mut failed): (Vec<_>, Vec<_>) = ended.into_iter().partition(Result::is_ok);
        failed.sort_by_key(|end| end.as_ref().err().is_some_and(|e| e.to_string() == INTERRUPTED));
        match failed.into_iter().find_map(Result::err) {
            Some(error) => Err(error),
            None => Ok(loaded.into_iter().flatten().collect()),
        }
    })
}

/// What a thread said before it ended.
fn said(fault: &(dyn Any + Send)) -> String {
    let text = fault.downcast_ref::<String>().map(String::as_str);
    let text = text.or(fault.downcast_ref::<&str>().copied()).unwrap_or("no reason");
    format!("the thread of a GPU ended: {text}")
}

fn seat(context: Context, mut model: Model) -> Seat {
    let (work, todo) = mpsc::channel::<Work>();
    let thread = thread::spawn(move || {
        gpu::take(context);
        for work in todo {
            work(&mut model);
        }
        // Memory is given back before its device.
        drop(model);
        drop(gpu::give());
    });
    Seat { work: Some(work), thread: Some(thread) }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.work = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Ranks {
    fn drop(&mut self) {
        let _turn = turn();
        if self.ended.get().is_some() {
            // Who did not end then may never: it is not waited for.
            self.seats.iter_mut().for_each(|seat| drop(seat.thread.take()));
        }
        self.seats.clear();
        self.peers.clear();
    }
}

/// Rows that stand side by side.
fn beside(steps: Vec<Step>) -> Result<Step, Error> {
    let logits: Vec<_> = steps.iter().map(|step| step.logits.view()).collect();
    let logits = if logits.iter().all(|part| part.nrows() == 0) {
        Array2::zeros((0, logits.iter().map(ndarray::ArrayBase::ncols).sum()))
    } else {
        concatenate(Axis(1), &logits)?
    };
    let first = steps.into_iter().next().ok_or("no rank")?;
    Ok(Step { logits, ..first })
}

/// Heads and channels of a layer's states, of all shares.
fn states(shares: &[Share], parts: &[&LinearState]) -> Result<LinearState, Error> {
    let recurrent: Vec<_> = parts.iter().map(|part| part.recurrent.view()).collect();
    let recurrent = concatenate(Axis(1), &recurrent)?;
    let (s, _, kept) = parts.first().ok_or("no rank")?.conv.dim();
    let channels = parts.iter().map(|part| part.conv.dim().1).sum();
    let mut conv = Array3::zeros((s, channels, kept));
    for (share, part) in shares.iter().zip(parts) {
        let own = share.channels().into_iter().flatten();
        for (to, from) in own.zip(part.conv.axis_iter(Axis(1))) {
            conv.index_axis_mut(Axis(1), to).assign(&from);
        }
    }
    Ok(LinearState { conv, recurrent })
}

impl Engine for Ranks {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn config(&self) -> &Config {
        &self.config
    }

    fn plan(&self) -> Plan {
        self.plan.clone()
    }

    fn falls_back(&self) -> Option<String> {
        self.falls_back.clone()
    }

    /// Sums over ranks are in their order, whatever is in the batch: all that one GPU promises.
    fn claims(&self) -> Claims {
        self.claims
    }

    fn reset(&mut self, sequences: usize) -> Result<(), Error> {
        self.each(move |model| model.reset(sequences)).map(drop)
    }

    fn lengths(&self) -> Vec<usize> {
        self.lengths_of(Engine::lengths)
    }

    fn pretend(&mut self, tokens: usize, seed: u64) -> Result<(), Error> {
        self.each(move |model| model.pretend(tokens, seed)).map(drop)
    }

    /// Of one GPU, in the mean.
    fn traffic(&self, depth: usize) -> Option<Traffic> {
        self.first(move |model| Ok(model.traffic(depth))).ok().flatten()
    }

    fn forward(&mut self, tokens: &[Vec<u32>], want: &Want) -> Result<Step, Error> {
        if want.forced.is_some() {
            return Err("intermediates are not forced on several GPUs".into());
        }
        if let Some(listener) = &mut self.listener
            && !(0..self.config.num_hidden_layers()).all(listener)
        {
            return Err(INTERRUPTED.into());
        }
        let tokens = tokens.to_vec();
        // Intermediates are in parts, and not told. What is whole everywhere is asked of the first.
        let first = Want { taps: false, greedy: false, ..want.clone() };
        let others = Want { last: Rows::None, hidden: false, routing: false, ..first.clone() };
        beside(self.each(move |model| {
            let want = if model.share.leads() { &first } else { &others };
            model.forward(&tokens, want)
        })?)
    }

    fn snapshot(&mut self) -> Result<Snapshot, Error> {
        self.first(Model::snapshot)
    }

    fn restore(&mut self, snapshot: Snapshot) -> Result<(), Error> {
        self.each(move |model| model.restore(snapshot)).map(drop)
    }

    fn release(&mut self, snapshot: Snapshot) {
        let release = move |model: &mut Model| {
            model.release(snapshot);
            Ok(())
        };
        // Parted ranks hold nothing that anybody asks for.
        let _ = self.each(release);
    }

    fn rollback(&mut self, keep: &[usize]) -> Result<(), Error> {
        let keep = keep.to_vec();
        self.each(move |model| model.rollback(&keep)).map(drop)
    }

    fn linear_states(&self) -> Result<Vec<Option<LinearState>>, Error> {
        let all = self.each(|model| model.linear_states())?;
        let layer = |i: usize| {
            let parts: Option<Vec<_>> = all.iter().map(|layers| layers[i].as_ref()).collect();
            parts.map(|parts| states(&self.shares, &parts)).transpose()
        };
        (0..self.config.num_hidden_layers()).map(layer).collect()
    }

    fn watch(&mut self, listener: Listener) {
        self.listener = Some(listener);
    }

    fn has_mtp(&self) -> bool {
        self.has_mtp
    }

    fn mtp(&mut self, tokens: &[Vec<u32>], hidden: &Array2<f32>) -> Result<Step, Error> {
        let (tokens, hidden) = (tokens.to_vec(), hidden.clone());
        beside(self.each(move |model| model.mtp(&tokens, &hidden))?)
    }

    fn mtp_feed(&mut self, tokens: &[Vec<u32>], hidden: &Array2<f32>) -> Result<(), Error> {
        let (tokens, hidden) = (tokens.to_vec(), hidden.clone());
        self.each(move |model| model.mtp_feed(&tokens, &hidden)).map(drop)
    }

    fn mtp_lengths(&self) -> Vec<usize> {
        self.lengths_of(Engine::mtp_lengths)
    }

    fn mtp_truncate(&mut self, keep: &[usize]) -> Result<(), Error> {
        let keep = keep.to_vec();
        self.each(move |model| model.mtp_truncate(&keep)).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use golden::{Weights, engine::LinearState, split::Split, synthetic::Synthetic};
    use ndarray::{Array2, Array3, Array4, Axis, s};

    use super::{Step, beside, states};

    #[test]
    fn logits_stand_side_by_side() {
        let step = |from: f32, rows: usize| Step {
            logits: Array2::from_shape_fn((rows, 2), |(i, j)| from + i as f32 + 0.1 * j as f32),
            hidden: vec![Array2::from_elem((1, 1), from)],
            ..Step::default()
        };
        let all = beside(vec![step(0.0, 3), step(10.0, 3)]).unwrap();
        assert_eq!(all.logits.row(2).to_vec(), [2.0, 2.1, 12.0, 12.1]);
        assert_eq!(all.hidden[0][[0, 0]], 0.0);
        assert_eq!(beside(vec![step(0.0, 0), step(1.0, 0)]).unwrap().logits.dim(), (0, 4));
    }

    #[test]
    fn states_are_where_the_whole_model_has_them() {
        let weights: Synthetic = "synthetic:ragged".parse().unwrap();
        let c = weights.config();
        let shares = Split::new(c, 2).unwrap().shares();
        let number = |i: usize, j: usize| (100 * i + j) as f32;
        let whole = LinearState {
            conv: Array3::from_shape_fn((2, c.conv_dim(), 2), |(i, j, _)| number(i, j)),
            recurrent: Array4::from_shape_fn((2, c.linear_num_value_heads, 1, 1), |(i, j, ..)| {
                number(i, j)
            }),
        };
        let parts: Vec<_> = shares
            .iter()
            .map(|share| {
                let channels: Vec<_> = share.channels().into_iter().flatten().collect();
                let own = share.config.linear_num_value_heads;
                let heads = share.rank * own..(share.rank + 1) * own;
                LinearState {
                    conv: whole.conv.select(Axis(1), &channels),
                    recurrent: whole.recurrent.slice(s![.., heads, .., ..]).to_owned(),
                }
            })
            .collect();
        let got = states(&shares, &parts.iter().collect::<Vec<_>>()).unwrap();
        assert_eq!((got.conv, got.recurrent), (whole.conv, whole.recurrent));
    }
}
