//! Which anchors a loader has: the part of planning that may have to read clocks.

use robocache_formats::{Dataset, Layout};
use robocache_types::{Clock, UniformClock};
use robocache_wire::spec::{AnchorSpec, LoaderSpec};

use crate::anchors::Anchors;
use crate::plan::PlanError;

/// LeRobot's frames, and those of frame tables, are clock 0 of their dataset.
pub const FRAME_CLOCK: usize = 0;

/// What the anchors are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AnchorKind {
    /// The dataset's own frames, their number known from the metadata.
    OwnFrames,
    /// The rows of a stream (its position), and its clock's number.
    StreamFrames {
        stream: usize,
        clock: usize,
    },
    Episodes,
    Grid,
}

impl AnchorKind {
    /// The clock whose rows the anchors are, if they are rows.
    pub fn clock(&self) -> Option<usize> {
        match self {
            Self::OwnFrames => Some(FRAME_CLOCK),
            Self::StreamFrames { clock, .. } => Some(*clock),
            Self::Episodes | Self::Grid => None,
        }
    }
}

/// What a spec's anchors are in this dataset.
pub fn frame_kind(dataset: &Dataset, spec: &LoaderSpec, name: &str) -> Result<AnchorKind, PlanError> {
    match spec.anchors {
        AnchorSpec::Episodes | AnchorSpec::Every { .. } => {
            if let Some(stream) = &spec.anchor_stream {
                return Err(PlanError::Parameter {
                    what: "anchor_stream",
                    wanted: "anchors=\"frames\" beside it".to_owned(),
                    found: format!("anchor_stream {stream:?} with {:?}", spec.anchors),
                });
            }
            if matches!(spec.anchors, AnchorSpec::Episodes) {
                Ok(AnchorKind::Episodes)
            } else {
                Ok(AnchorKind::Grid)
            }
        }
        AnchorSpec::Frames => {
            let streams = dataset.streams();
            if let Some(wanted) = &spec.anchor_stream {
                let stream =
                    streams.iter().position(|s| s.name == *wanted).ok_or_else(|| PlanError::NoStream {
                        dataset: name.to_owned(),
                        wanted: wanted.clone(),
                        found: streams.iter().map(|s| s.name.clone()).collect(),
                    })?;
                let clock = streams[stream].clock;
                let own = clock == FRAME_CLOCK && matches!(dataset.layout(), Layout::LeRobot { .. });
                return Ok(if own {
                    AnchorKind::OwnFrames
                } else {
                    AnchorKind::StreamFrames { stream, clock }
                });
            }
            if matches!(dataset.layout(), Layout::LeRobot { .. }) {
                return Ok(AnchorKind::OwnFrames);
            }
            match streams.first() {
                Some(first) if streams.iter().all(|s| s.clock == first.clock) => {
                    Ok(AnchorKind::StreamFrames { stream: 0, clock: first.clock })
                }
                _ => Err(PlanError::NoFrameClock {
                    dataset: name.to_owned(),
                    streams: streams.iter().map(|s| s.name.clone()).collect(),
                }),
            }
        }
    }
}

/// The anchors of the chosen episodes.
pub fn plan(
    dataset: &Dataset,
    spec: &LoaderSpec,
    kind: &AnchorKind,
    name: &str,
) -> Result<Anchors, PlanError> {
    let chosen = chosen_episodes(dataset, spec, name)?;
    let anchors = match *kind {
        AnchorKind::OwnFrames => {
            let episodes = dataset.episodes();
            Anchors::frames(chosen.iter().map(|&e| (e, episodes[e as usize].frames.unwrap_or(0) as u64)))
        }
        AnchorKind::StreamFrames { stream, .. } => {
            let read = |&e: &u32| Ok::<(u32, Clock), PlanError>((e, dataset.clock(e as usize, stream)?));
            Anchors::clocks(in_parallel(&chosen, read)?)
        }
        AnchorKind::Episodes => {
            let read = |&e: &u32| Ok::<(u32, i64), PlanError>((e, dataset.span(e as usize)?.0));
            Anchors::starts(in_parallel(&chosen, read)?)
        }
        AnchorKind::Grid => {
            let AnchorSpec::Every { hz } = spec.anchors else { unreachable!("a grid has a rate") };
            let read = |&e: &u32| {
                let (first, last) = dataset.span(e as usize)?;
                Ok::<(u32, UniformClock), PlanError>((e, grid(hz, first, last)?))
            };
            Anchors::grid(in_parallel(&chosen, read)?)
        }
    };
    if anchors.is_empty() {
        let why = match (chosen.len(), dataset.episodes().len()) {
            (_, 0) => format!("{name:?} has no episodes"),
            (0, _) => "episodes= chooses none".to_owned(),
            (n, _) => format!("the {n} chosen episodes of {name:?} have no frames"),
        };
        return Err(PlanError::NoAnchors { why });
    }
    Ok(anchors)
}

/// Rows of a grid from `first` to `last`, both included.
fn grid(hz: f64, first: i64, last: i64) -> Result<UniformClock, PlanError> {
    let refuse = |source| PlanError::Grid { hz, source };
    let one = UniformClock::new(first, hz, 1).map_err(refuse)?;
    let (num, den) = one.period_ns();
    let steps = (i128::from(last) - i128::from(first)) * i128::from(den) / i128::from(num);
    let mut rows = usize::try_from(steps).unwrap_or(usize::MAX).saturating_add(1);
    let clock = UniformClock::new(first, hz, rows).map_err(refuse)?;
    // Rounding to a nanosecond may put one more row on `last` itself.
    if clock.t_ns(i64::try_from(rows).unwrap_or(i64::MAX)) <= last {
        rows += 1;
        return UniformClock::new(first, hz, rows).map_err(refuse);
    }
    Ok(clock)
}

fn chosen_episodes(dataset: &Dataset, spec: &LoaderSpec, name: &str) -> Result<Vec<u32>, PlanError> {
    let episodes = dataset.episodes();
    let number = |position: usize| u32::try_from(position).expect("episodes are numbered in u32");
    let Some(wanted) = &spec.episodes else { return Ok((0..episodes.len()).map(number).collect()) };
    let by_index: std::collections::HashMap<i64, usize> =
        episodes.iter().enumerate().map(|(position, episode)| (episode.index, position)).collect();
    let mut chosen = Vec::with_capacity(wanted.len());
    for index in wanted {
        let position = by_index.get(index).ok_or_else(|| PlanError::NoEpisode {
            dataset: name.to_owned(),
            wanted: *index,
            episodes: episodes.len(),
            first: episodes.first().map_or(0, |e| e.index),
            last: episodes.last().map_or(0, |e| e.index),
        })?;
        chosen.push(number(*position));
    }
    chosen.sort_unstable();
    if let Some(pair) = chosen.windows(2).find(|pair| pair[0] == pair[1]) {
        let index = episodes[pair[0] as usize].index;
        return Err(PlanError::Twice { key: format!("episode {index}") });
    }
    Ok(chosen)
}

/// Maps over episodes with a few threads: planning a stream table reads every episode's clock.
fn in_parallel<T: Send, E: Send>(
    episodes: &[u32],
    read: impl Fn(&u32) -> Result<T, E> + Sync,
) -> Result<Vec<T>, E> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(16);
    let share = episodes.len().div_ceil(threads).max(1);
    let results = std::thread::scope(|scope| {
        let workers: Vec<_> = episodes
            .chunks(share)
            .map(|chunk| scope.spawn(|| chunk.iter().map(&read).collect::<Result<Vec<T>, E>>()))
            .collect();
        workers
            .into_iter()
            .map(|worker| worker.join().expect("readers contain their panics"))
            .collect::<Vec<_>>()
    });
    let mut all = Vec::with_capacity(episodes.len());
    for result in results {
        all.extend(result?);
    }
    Ok(all)
}

/// Identity of what the numbers of a state mean: the dataset, its anchors and the choice of episodes.
pub fn fingerprint(dataset: &Dataset, spec: &LoaderSpec, anchors: &Anchors) -> [u8; 16] {
    let mut text = String::new();
    let hex: String = dataset.fingerprint().iter().map(|byte| format!("{byte:02x}")).collect();
    text.push_str(&hex);
    text.push_str(&format!("|{:?}|{:?}|{}|", spec.anchors, spec.anchor_stream, anchors.len()));
    for episode in anchors.episodes() {
        text.push_str(&format!("{episode},"));
    }
    twox_hash::XxHash3_128::oneshot(text.as_bytes()).to_le_bytes()
}
