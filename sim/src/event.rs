//! Events: marks in streams' queues.

use crate::error::{Code, Step, fail};
use crate::state::State;
use crate::stream::Mark;
use torch_uvm::driver::{DeviceIndex, Event};

/// Where an event was last recorded.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Recorded {
    Never,
    Stream(Mark),
    /// In a capture, where these nodes were the last.
    Capture {
        id: u64,
        nodes: Vec<usize>,
    },
}

/// One event.
pub(crate) struct EventState {
    pub device: DeviceIndex,
    pub timing: bool,
    pub recorded: Recorded,
    /// How often it was asked in vain since its record.
    pub polls: u32,
    /// When it completed, by the simulated clock, and which record that was.
    time: Option<(Mark, u64)>,
}

impl State {
    pub fn add_event(&mut self, device: DeviceIndex, timing: bool) -> Event {
        let handle = 0x4550_0000_0000 + self.next_id() * 0x40;
        self.events.insert(handle, EventState { device, timing, recorded: Recorded::Never, polls: 0, time: None });
        Event(handle)
    }

    pub fn event(&mut self, event: Event) -> Step<&mut EventState> {
        self.events
            .get_mut(&event.0)
            .ok_or_else(|| fail(Code::INVALID_HANDLE, format!("{:#x} is not an event", event.0)))
    }

    /// An event's record was reached in its stream.
    pub fn record_time(&mut self, event: u64, mark: Mark, now: u64) {
        if let Some(event) = self.events.get_mut(&event) {
            event.time = Some((mark, now));
        }
    }

    /// Milliseconds from one completed event to another.
    pub fn elapsed(&mut self, start: Event, end: Event) -> Step<f32> {
        if self.event(start)?.device != self.event(end)?.device {
            return Err(fail(Code::INVALID_HANDLE, "the events are of different devices"));
        }
        let mut times = [0; 2];
        for (time, event) in times.iter_mut().zip([start, end]) {
            let state = self.event(event)?;
            if !state.timing {
                return Err(fail(Code::INVALID_HANDLE, "the event was made without timing"));
            }
            let Recorded::Stream(mark) = state.recorded else {
                return Err(fail(Code::INVALID_HANDLE, "the event was never recorded"));
            };
            *time = match state.time {
                Some((recorded, now)) if recorded == mark => now,
                _ => return Err(Code::NOT_READY.into()),
            };
        }
        Ok((times[1] as f64 - times[0] as f64) as f32 / 1e6)
    }
}
