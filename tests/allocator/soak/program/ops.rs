//! What a program may do, and how often it does it.

/// What a program may do next, and how often it does.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Op {
    Allocate,
    Free,
    UseElsewhere,
    Rewrite,
    Verify,
    Synchronize,
    EmptyCache,
    Prefetch,
    Advise,
    Discard,
    OpenPool,
    ClosePool,
    ReleasePool,
    SetPool,
    Capture,
    Replay,
    DropGraph,
    Checkpoint,
    Restore,
    Options,
    NativeOptions,
    Fraction,
    TooMuch,
    Look,
    History,
    FreeTwice,
    Burst,
    AllocateAt,
    Hoard,
    Give,
    Take,
    Others,
}

pub(super) const WEIGHTS: &[(u32, Op)] = &[
    (300, Op::Allocate),
    (290, Op::Free),
    (60, Op::UseElsewhere),
    (25, Op::Rewrite),
    (30, Op::Verify),
    (12, Op::Synchronize),
    (4, Op::EmptyCache),
    (30, Op::Prefetch),
    (10, Op::Advise),
    (10, Op::Discard),
    (6, Op::OpenPool),
    (12, Op::ClosePool),
    (4, Op::ReleasePool),
    (4, Op::SetPool),
    (3, Op::Capture),
    (6, Op::Replay),
    (2, Op::DropGraph),
    (3, Op::Checkpoint),
    (2, Op::Restore),
    (2, Op::Options),
    (2, Op::NativeOptions),
    (2, Op::Fraction),
    (3, Op::TooMuch),
    (10, Op::Look),
    (1, Op::History),
    (4, Op::FreeTwice),
    (8, Op::Burst),
    (6, Op::AllocateAt),
    (4, Op::Hoard),
    (8, Op::Give),
    (8, Op::Take),
    (1, Op::Others),
];

impl Op {
    /// Whether a program that is not alone does it: what stops all streams, or concerns the whole machine, it does not.
    pub(super) fn shared(self) -> bool {
        !matches!(
            self,
            Op::Capture
                | Op::Replay
                | Op::DropGraph
                | Op::Checkpoint
                | Op::Restore
                | Op::FreeTwice
                | Op::AllocateAt
                | Op::Hoard
                | Op::Fraction
                | Op::Others
        )
    }
}
