//! Streams: queues that run late.
//!
//! Operations are numbered in each stream; an operation may depend on numbers of other streams (events, the legacy stream's
//! order). Dependencies only ever point at what was queued before, so whatever must complete can always be completed.

use crate::error::{Code, Step, fail};
use crate::profile::Schedule;
use crate::state::{Session, State};
use crate::types::{STREAM_LEGACY, STREAM_PER_THREAD};
use crate::work::Work;
use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use torch_uvm::driver::{DeviceIndex, Stream};

/// Streams are known inside by one number: a created stream's handle, or a default stream's own.
pub(crate) type Key = u64;

/// Queues longer than this are run down as real ones are: launching waits for room.
const QUEUE_LIMIT: usize = 1024;

/// How often a seeded machine says "not ready" before it makes a polled event complete.
const SEEDED_POLLS: u32 = 16;

/// A number in a stream's queue: complete once the stream has completed so many operations.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Mark {
    pub key: Key,
    pub seq: u64,
}

/// A queued operation.
struct Item {
    submitted_ns: u64,
    dependencies: Vec<Mark>,
    work: Work,
}

/// A stream's part in a capture.
pub(crate) struct StreamCapture {
    pub id: u64,
    /// The nodes that the next one depends on.
    pub nodes: Vec<usize>,
}

/// One stream.
pub(crate) struct StreamState {
    pub device: DeviceIndex,
    /// Whether it keeps the legacy stream's order.
    pub blocking: bool,
    pub legacy: bool,
    pub priority: i32,
    pub id: u64,
    queue: VecDeque<Item>,
    pub submitted: u64,
    pub completed: u64,
    /// Its first operation is a host function that runs at present.
    busy: bool,
    /// When its last operation was done, by the simulated clock.
    pub time_ns: u64,
    pub capture: Option<StreamCapture>,
    /// Made by the program, rather than a default stream.
    pub created: bool,
    pub destroyed: bool,
    polls: u32,
}

/// What became of trying to run a stream's first operation.
pub(crate) enum Tried {
    Ran,
    Empty,
    /// This must complete first.
    Blocked(Mark),
    /// A host function runs, or a hold is not released.
    Busy,
}

impl State {
    // ---- handles ------------------------------------------------------------------------------------------------

    /// The stream a handle means to this thread.
    pub fn stream_key(&mut self, device: DeviceIndex, stream: Stream) -> Step<Key> {
        if stream.0 == 0 || stream == STREAM_LEGACY {
            self.check_device(device)?;
            return Ok(self.legacy_keys[device as usize]);
        }
        if stream == STREAM_PER_THREAD {
            self.check_device(device)?;
            let id = (crate::state::thread_number(), device);
            if let Some(&key) = self.thread_streams.get(&id) {
                return Ok(key);
            }
            let key = self.add_stream(device, true, false, 0);
            self.thread_streams.insert(id, key);
            return Ok(key);
        }
        match self.streams.get(&stream.0) {
            Some(state) if state.created && !state.destroyed => Ok(stream.0),
            _ => Err(fail(Code::INVALID_HANDLE, format!("{:#x} is not a stream", stream.0))),
        }
    }

    /// Adds a stream.
    pub fn add_stream(&mut self, device: DeviceIndex, blocking: bool, legacy: bool, priority: i32) -> Key {
        let id = self.next_id();
        // Looks like an address, so that nobody takes it for a small special handle.
        let key = 0x5350_0000_0000 + id * 0x100;
        self.streams.insert(
            key,
            StreamState {
                device,
                blocking,
                legacy,
                priority,
                id,
                queue: VecDeque::new(),
                submitted: 0,
                completed: 0,
                busy: false,
                time_ns: 0,
                capture: None,
                created: false,
                destroyed: false,
                polls: 0,
            },
        );
        key
    }

    /// A stream that [`State::stream_key`] has found.
    pub fn stream(&mut self, key: Key) -> Step<&mut StreamState> {
        self.streams.get_mut(&key).ok_or_else(|| fail(Code::INVALID_HANDLE, "the stream is gone"))
    }

    /// Whether a mark is complete. A stream that is gone has completed everything.
    pub fn is_done(&self, mark: Mark) -> bool {
        self.streams.get(&mark.key).is_none_or(|stream| stream.completed >= mark.seq)
    }

    /// The end of a stream's queue as it is now.
    pub fn end_of(&self, key: Key) -> Mark {
        Mark { key, seq: self.streams.get(&key).map_or(0, |stream| stream.submitted) }
    }

    /// The ends of the queues of all streams of a device that have work (of all devices: `None`).
    pub fn ends(&self, device: Option<DeviceIndex>) -> Vec<Mark> {
        let pending = self.active.iter().filter_map(|key| Some((*key, self.streams.get(key)?)));
        pending
            .filter(|(_, stream)| device.is_none_or(|device| stream.device == device))
            .map(|(key, stream)| Mark { key, seq: stream.submitted })
            .collect()
    }

    // ---- queueing -----------------------------------------------------------------------------------------------

    /// Puts an operation at the end of a stream's queue, in the legacy stream's order.
    pub fn submit(&mut self, key: Key, work: Work, mut dependencies: Vec<Mark>) -> Step<Mark> {
        let submitted_ns = self.clock_ns;
        let stream = self.stream(key)?;
        let (device, legacy, blocking) = (stream.device, stream.legacy, stream.blocking);
        if legacy {
            for &other in &self.active {
                if let Some(other_state) = self.streams.get(&other)
                    && other != key
                    && other_state.blocking
                    && other_state.device == device
                    && other_state.completed < other_state.submitted
                {
                    dependencies.push(Mark { key: other, seq: other_state.submitted });
                }
            }
        } else if blocking {
            let end = self.end_of(self.legacy_keys[device as usize]);
            if !self.is_done(end) {
                dependencies.push(end);
            }
        }
        let stream = self.stream(key)?;
        if stream.queue.is_empty() {
            self.active.push(key);
        }
        let stream = self.stream(key)?;
        stream.queue.push_back(Item { submitted_ns, dependencies, work });
        stream.submitted += 1;
        stream.polls = 0;
        let (mark, long) = (Mark { key, seq: stream.submitted }, stream.queue.len() > QUEUE_LIMIT);
        self.pending += 1;
        if self.config.schedule == Schedule::Eager {
            self.advance(mark);
        } else if long {
            self.advance(Mark { key, seq: mark.seq - (QUEUE_LIMIT / 2) as u64 });
        }
        Ok(mark)
    }

    /// Runs the first operation of a stream, if it can run.
    pub fn try_run(&mut self, key: Key) -> Tried {
        let Some(stream) = self.streams.get(&key) else { return Tried::Empty };
        if stream.busy {
            return Tried::Busy;
        }
        let Some(item) = stream.queue.front() else { return Tried::Empty };
        if let Some(&first) = item.dependencies.iter().find(|mark| !self.is_done(**mark)) {
            return Tried::Blocked(first);
        }
        if let Work::Hold(released) = &item.work
            && !self.running_down
            && !released.load(Ordering::Relaxed)
        {
            return Tried::Busy;
        }
        let begun = item.dependencies.iter().filter_map(|mark| self.streams.get(&mark.key)).map(|s| s.time_ns).max();
        let begun = begun.unwrap_or(0).max(stream.time_ns).max(item.submitted_ns);
        let (device, seq) = (stream.device, stream.completed + 1);
        let Some(stream) = self.streams.get_mut(&key) else { return Tried::Empty };
        if let Some(Item { work: Work::Host(function), .. }) = stream.queue.front()
            && !self.running_down
        {
            let function = function.clone();
            stream.busy = true;
            stream.time_ns = begun;
            self.physical.counters.operations += 1;
            self.start_callback(key, function);
            return Tried::Busy;
        }
        let Some(item) = stream.queue.pop_front() else { return Tried::Empty };
        let spent = if let Work::Record { event } = item.work {
            self.record_time(event, Mark { key, seq }, begun);
            0.0
        } else if self.broken.is_some() {
            0.0
        } else {
            match self.run_work(device, item.work) {
                Ok(spent) => spent,
                Err(error) => {
                    // What a real device does with an address it cannot use: nothing works any more.
                    self.broken = Some((Code::ILLEGAL_ADDRESS, error.detail));
                    0.0
                }
            }
        };
        self.completed(key, begun + spent as u64);
        Tried::Ran
    }

    /// Books the first operation of a stream as done.
    fn completed(&mut self, key: Key, now: u64) {
        self.pending -= 1;
        self.last_done_ns = self.last_done_ns.max(now);
        let Some(stream) = self.streams.get_mut(&key) else { return };
        stream.completed += 1;
        stream.time_ns = stream.time_ns.max(now);
        if stream.queue.is_empty() {
            let gone = stream.destroyed;
            self.active.retain(|&other| other != key);
            if gone {
                self.streams.remove(&key);
            }
        }
    }

    /// The host function at the head of a stream has returned.
    pub fn callback_done(&mut self, key: Key) {
        if let Some(stream) = self.streams.get_mut(&key) {
            stream.busy = false;
            stream.queue.pop_front();
            self.completed(key, 0);
        }
    }

    /// Runs what it takes to complete a mark, as far as that goes without waiting for host functions; whether it is done.
    pub fn advance(&mut self, mark: Mark) -> bool {
        let mut path = vec![mark];
        while let Some(&next) = path.last() {
            if self.is_done(next) {
                path.pop();
                continue;
            }
            match self.try_run(next.key) {
                Tried::Ran => {}
                Tried::Blocked(first) => path.push(first),
                Tried::Busy => return false,
                Tried::Empty => {
                    path.pop();
                }
            }
        }
        true
    }

    /// Whether a polled mark is complete; `polls` is how often it was asked without success.
    pub fn poll(&mut self, mark: Mark, polls: u32) -> bool {
        if self.is_done(mark) {
            return true;
        }
        let patience = match self.config.schedule {
            Schedule::Eager => 0,
            Schedule::Late => self.config.late_polls,
            Schedule::Seeded(_) => SEEDED_POLLS,
        };
        let lucky = matches!(self.config.schedule, Schedule::Seeded(_)) && self.random(4) == 0;
        (polls >= patience || lucky) && self.advance(mark)
    }

    /// [`State::poll`] of all of a stream's work.
    pub fn poll_stream(&mut self, key: Key) -> Step<bool> {
        let mark = self.end_of(key);
        let polls = self.stream(key)?.polls;
        let done = self.poll(mark, polls);
        if let Some(stream) = self.streams.get_mut(&key) {
            stream.polls = if done { 0 } else { polls + 1 };
        }
        Ok(done)
    }

    /// The seeded scheduler's moment, at each call: some operations of some streams may run.
    pub fn tick(&mut self) {
        if self.pending == 0 || !matches!(self.config.schedule, Schedule::Seeded(_)) || self.random(4) != 0 {
            return;
        }
        for _ in 0..=self.random(3) {
            if self.active.is_empty() {
                return;
            }
            let chosen = self.random(self.active.len() as u64) as usize;
            let key = self.active[chosen];
            self.try_run(key);
        }
    }
}

impl Session<'_> {
    /// Waits until a mark is complete.
    pub fn wait_for(&mut self, mark: Mark) {
        while !self.advance(mark) {
            // A host function runs on the callback thread: it needs the lock to report back.
            self.wait_for_callback();
        }
        let done = self.streams.get(&mark.key).map_or(0, |stream| stream.time_ns);
        self.clock_ns = self.clock_ns.max(done);
    }

    /// Waits for all work of a device, or of all.
    pub fn wait_for_all(&mut self, device: Option<DeviceIndex>) {
        for mark in self.ends(device) {
            self.wait_for(mark);
        }
    }
}
