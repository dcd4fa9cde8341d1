//! Stream tables: a directory per episode, a Parquet file and a clock per stream, and the `robocache.toml` that says
//! how to read them.
//!
//! The flaws are those of real recordings, one of each: stamps that jitter, stamps that repeat, a hole, stamps in
//! different units, streams that start and end apart. All clocks count from the same epoch.

use std::fmt::Write as _;
use std::ops::Range;
use std::sync::Arc;

use arrow::array::{ArrayRef, Float32Array, Float64Array, Int64Array, UInt64Array};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};

use super::lerobot::write_text;
use super::signal::{Rng, Signals};
use super::table::TableWriter;
use super::{Job, SynthArgs, Written, blocks};

/// When the first episode begins: nanoseconds since 1970.
const EPOCH_NS: i64 = 1_767_225_600_000_000_000;
/// From one episode's start to the next one's, beyond its length.
const PAUSE_NS: i64 = 10_000_000_000;
/// The imu repeats a stamp every so many rows.
const REPEAT_EVERY: u64 = 500;
/// Shortest episode that gets a hole, and the hole, in seconds.
const HOLE: (f64, f64) = (2.0, 0.5);

/// One table of an episode.
#[derive(Debug, Clone)]
struct Table {
    name: &'static str,
    hz: f64,
    /// Seconds after the episode's start.
    starts_s: f64,
    time: Time,
    columns: Columns,
    flaw: Flaw,
    interp: Option<&'static str>,
}

/// How a table stores its stamps.
#[derive(Debug, Clone, Copy)]
enum Time {
    /// `stamp_ns`, int64 nanoseconds.
    Nanoseconds,
    /// `timestamp_us`, uint64 microseconds.
    Microseconds,
    /// `t`, float64 seconds.
    Seconds,
}

#[derive(Debug, Clone)]
enum Columns {
    /// A float32 column each.
    Scalars(&'static [&'static str]),
    /// A position and a unit quaternion.
    Pose,
    /// One vector column.
    Vector(&'static str, u32),
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Flaw {
    None,
    JitterAndRepeats,
    Hole,
}

const POSE: [&str; 7] = [
    "position.x",
    "position.y",
    "position.z",
    "orientation.x",
    "orientation.y",
    "orientation.z",
    "orientation.w",
];

fn tables(args: &SynthArgs) -> Vec<Table> {
    let table = |name, hz, starts_s, time, columns| Table {
        name,
        hz,
        starts_s,
        time,
        columns,
        flaw: Flaw::None,
        interp: None,
    };
    let imu: &[&str] = &[
        "angular_velocity.x",
        "angular_velocity.y",
        "angular_velocity.z",
        "linear_acceleration.x",
        "linear_acceleration.y",
        "linear_acceleration.z",
    ];
    let wheels: &[&str] = &["speed.front_left", "speed.front_right", "speed.rear_left", "speed.rear_right"];
    let fps = f64::from(args.fps);
    let mut tables = vec![
        Table {
            flaw: Flaw::JitterAndRepeats,
            ..table("imu", 200.0, 0.0, Time::Nanoseconds, Columns::Scalars(imu))
        },
        Table { flaw: Flaw::Hole, ..table("wheel", 50.0, 0.013, Time::Seconds, Columns::Scalars(wheels)) },
        table("camera_pose", 20.0, 0.04, Time::Microseconds, Columns::Pose),
        table("joints", 100.0, 0.002, Time::Nanoseconds, Columns::Vector("position", args.state_dim)),
        Table {
            interp: Some("previous"),
            ..table("command", fps, 0.0, Time::Nanoseconds, Columns::Vector("target", args.action_dim))
        },
    ];
    if args.tactile_dim > 0 {
        let columns = Columns::Vector("pressure", args.tactile_dim);
        tables.push(table("tactile", 150.0, 0.005, Time::Microseconds, columns));
    }
    tables
}

impl Columns {
    fn floats(&self) -> u64 {
        match self {
            Self::Scalars(names) => names.len() as u64,
            Self::Pose => POSE.len() as u64,
            Self::Vector(_, dim) => u64::from(*dim),
        }
    }
}

fn episode_seconds(args: &SynthArgs) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "frames are below 2^53")]
    let frames = args.frames as f64;
    frames / f64::from(args.fps)
}

impl Table {
    /// Rows of the grid; the hole takes some of them away.
    fn rows(&self, args: &SynthArgs) -> u64 {
        let seconds = (episode_seconds(args) - self.starts_s).max(0.0);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "not negative, below 2^53"
        )]
        let rows = (seconds * self.hz).round() as u64;
        rows.max(1)
    }

    /// Whether row `row` of the grid was lost to the hole.
    fn lost(&self, row: u64, args: &SynthArgs) -> bool {
        let seconds = episode_seconds(args);
        let (shortest, hole) = HOLE;
        #[expect(clippy::cast_precision_loss, reason = "rows are below 2^53")]
        let t = row as f64 / self.hz;
        self.flaw == Flaw::Hole && seconds >= shortest && (seconds / 2.0..seconds / 2.0 + hole).contains(&t)
    }

    /// Nanoseconds of rows `block` since the episode's start, `None` for rows that were lost.
    fn stamps_ns(&self, block: Range<u64>, args: &SynthArgs, rng: &mut Rng) -> Vec<i64> {
        let mut stamps = Vec::new();
        for row in block {
            #[expect(clippy::cast_precision_loss, reason = "rows are below 2^53")]
            let nth = row as f64;
            let mut seconds = self.starts_s + nth / self.hz;
            if self.flaw == Flaw::JitterAndRepeats {
                // Less than half a period either way: stamps still ascend.
                seconds += rng.noise().mul_add(0.2, 0.4) / self.hz;
            }
            #[expect(clippy::cast_possible_truncation, reason = "an episode is shorter than 292 years")]
            let stamp = (seconds * 1e9).round() as i64;
            let repeats = self.flaw == Flaw::JitterAndRepeats && row > 0 && row.is_multiple_of(REPEAT_EVERY);
            match stamps.last() {
                Some(before) if repeats => stamps.push(*before),
                _ if self.lost(row, args) => {}
                _ => stamps.push(stamp),
            }
        }
        stamps
    }

    fn schema(&self, args: &SynthArgs) -> SchemaRef {
        let (time, data_type) = self.time.column();
        let mut fields = vec![Field::new(time, data_type, false)];
        let scalar = |name: &&str| Field::new(*name, DataType::Float32, true);
        match &self.columns {
            Columns::Scalars(names) => fields.extend(names.iter().map(scalar)),
            Columns::Pose => fields.extend(POSE.iter().map(scalar)),
            Columns::Vector(name, dim) => fields.push(Field::new(*name, args.list.data_type(*dim), true)),
        }
        Arc::new(Schema::new(fields))
    }

    fn values(
        &self,
        signals: &mut Signals,
        stamps_ns: &[i64],
        args: &SynthArgs,
    ) -> anyhow::Result<Vec<ArrayRef>> {
        let mut rows = Vec::new();
        #[expect(clippy::cast_precision_loss, reason = "a signal's time need not be exact")]
        signals.fill(stamps_ns.iter().map(|stamp| *stamp as f64 / 1e9), &mut rows);
        let width = match &self.columns {
            Columns::Vector(_, dim) => return Ok(vec![args.list.array(*dim, rows)?]),
            Columns::Scalars(names) => names.len(),
            Columns::Pose => {
                rows.chunks_exact_mut(POSE.len()).for_each(|row| normalise(&mut row[3..]));
                POSE.len()
            }
        };
        let column = |nth| rows.iter().skip(nth).step_by(width).copied().collect::<Float32Array>();
        Ok((0..width).map(|nth| Arc::new(column(nth)) as ArrayRef).collect())
    }
}

fn normalise(quaternion: &mut [f32]) {
    // Away from zero, so that it has a direction.
    if let Some(w) = quaternion.last_mut() {
        *w += 2.0;
    }
    let norm = quaternion.iter().map(|x| x * x).sum::<f32>().sqrt();
    quaternion.iter_mut().for_each(|x| *x /= norm);
}

impl Time {
    fn column(self) -> (&'static str, DataType) {
        match self {
            Self::Nanoseconds => ("stamp_ns", DataType::Int64),
            Self::Microseconds => ("timestamp_us", DataType::UInt64),
            Self::Seconds => ("t", DataType::Float64),
        }
    }

    fn unit(self) -> &'static str {
        match self {
            Self::Nanoseconds => "ns",
            Self::Microseconds => "us",
            Self::Seconds => "s",
        }
    }

    fn array(self, stamps_ns: impl Iterator<Item = i64>) -> ArrayRef {
        match self {
            Self::Nanoseconds => Arc::new(stamps_ns.collect::<Int64Array>()),
            Self::Microseconds => {
                Arc::new(stamps_ns.map(|stamp| (stamp / 1000).unsigned_abs()).collect::<UInt64Array>())
            }
            #[expect(clippy::cast_precision_loss, reason = "that is what float seconds lose")]
            Self::Seconds => Arc::new(stamps_ns.map(|stamp| stamp as f64 / 1e9).collect::<Float64Array>()),
        }
    }
}

/// Bytes one episode takes in memory, holes not counted.
pub(crate) fn episode_bytes(args: &SynthArgs) -> u64 {
    tables(args).iter().map(|table| table.rows(args) * (8 + 4 * table.columns.floats())).sum()
}

/// Writes the dataset that `job` asks for.
pub(crate) fn write(job: &Job<'_>) -> anyhow::Result<Written> {
    let args = job.args;
    let tables = tables(args);
    let mut written = Written::default();
    #[expect(clippy::cast_possible_truncation, reason = "an episode is shorter than 292 years")]
    let apart_ns = (episode_seconds(args) * 1e9) as i64 + PAUSE_NS;
    let mut start_ns = EPOCH_NS;
    for episode in 0..job.episodes {
        let directory = args.out.join(format!("episode_{episode:06}"));
        for table in &tables {
            let schema = table.schema(args);
            let path = directory.join(format!("{}.parquet", table.name));
            let mut writer = TableWriter::create(&path, &schema, args.codec, &[])?;
            let mut rng = Rng::new(args.seed ^ 0x7469_6d65, table.name, episode);
            let dim = u32::try_from(table.columns.floats())?;
            let mut signals = Signals::new(args.seed, table.name, episode, dim, 0.005);
            for block in blocks(table.rows(args)) {
                let rows = block.end - block.start;
                let stamps_ns = table.stamps_ns(block, args, &mut rng);
                let mut columns = vec![table.time.array(stamps_ns.iter().map(|stamp| start_ns + stamp))];
                columns.extend(table.values(&mut signals, &stamps_ns, args)?);
                writer.write(columns, &schema)?;
                written.frames += stamps_ns.len() as u64;
                job.progress.inc(rows * (8 + 4 * table.columns.floats()));
            }
            written.file_bytes += writer.close()?;
            written.files += 1;
        }
        start_ns += apart_ns;
    }
    write_text(&args.out.join("robocache.toml"), &manifest(&tables)?)?;
    Ok(written)
}

fn manifest(tables: &[Table]) -> anyhow::Result<String> {
    let mut text = "layout = \"streams\"\nepisodes = \"episode_*\"\n".to_owned();
    for table in tables {
        let Table { name, time, columns, flaw, interp, .. } = table;
        let file = format!("{name}.parquet");
        let mut stream = |name: &str, columns: &[&str], interp: Option<&str>| {
            write!(text, "\n[streams.{name}]\nfile = {file:?}\n")?;
            writeln!(text, "time = {{ column = {:?}, unit = {:?} }}", time.column().0, time.unit())?;
            writeln!(text, "columns = {columns:?}")?;
            if *flaw == Flaw::JitterAndRepeats {
                writeln!(text, "duplicates = \"last\"")?;
            }
            if let Some(interp) = interp {
                writeln!(text, "interp = {interp:?}")?;
            }
            std::fmt::Result::Ok(())
        };
        match columns {
            Columns::Scalars(names) => stream(name, names, *interp)?,
            Columns::Vector(column, _) => stream(name, &[column], *interp)?,
            Columns::Pose => {
                stream("camera_position", &POSE[..3], None)?;
                stream("camera_orientation", &POSE[3..], Some("slerp"))?;
            }
        }
    }
    Ok(text)
}
