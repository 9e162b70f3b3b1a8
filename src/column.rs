//! What a number is called: the columns of the tables that programs read by name.

use std::borrow::Cow;

/// How the numbers of a column are meant.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// As a quantity.
    Quantity,
    /// 0 is no, 1 is yes.
    Flag,
    /// 0, 1, 2, … stand for these words.
    Words(&'static [&'static str]),
}

impl Kind {
    /// The type of the values in Python.
    pub fn python_type(self) -> &'static str {
        match self {
            Self::Quantity => "int",
            Self::Flag => "bool",
            Self::Words(_) => "str",
        }
    }
}

/// A column of a table of numbers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Column {
    /// Its name.
    pub name: Cow<'static, str>,
    /// What its numbers are, in words.
    pub meaning: &'static str,
    /// How a number is meant.
    pub kind: Kind,
    /// Where `torch.cuda.memory_stats()` has it, below `uvm.`; keys joined by dots. Empty: nowhere.
    pub path: Cow<'static, str>,
}

impl Column {
    /// A column of quantities.
    pub fn new(name: impl Into<Cow<'static, str>>, meaning: &'static str) -> Self {
        Self { name: name.into(), meaning, kind: Kind::Quantity, path: Cow::Borrowed("") }
    }

    /// The same, whose numbers are meant otherwise.
    #[must_use]
    pub fn of_kind(self, kind: Kind) -> Self {
        Self { kind, ..self }
    }

    /// The same, found in `torch.cuda.memory_stats()` too.
    #[must_use]
    pub fn in_memory_stats(self, path: impl Into<Cow<'static, str>>) -> Self {
        Self { path: path.into(), ..self }
    }
}
