// cuda-int4-decode: generates from a .pte at the command line, with no Python anywhere.
//
// Options -> Model -> Decoder -> tokens on stdout as they are chosen, times on stderr. Exit codes:
// 0 done, 1 the work failed (the reason is on stderr), 2 the command line was wrong, 130 Ctrl-C.
#include <executorch/runtime/platform/platform.h>
#include <getopt.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cinttypes>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "c_api.h"
#include "decoder.h"
#include "report.h"

namespace {

using cuda_int4::Decoder;
using cuda_int4::GenerateCallbacks;
using cuda_int4::GenerateStats;
using cuda_int4::Model;
using executorch::runtime::Error;

constexpr int kFailed = 1;
constexpr int kUsage = 2;
constexpr int kInterrupted = 130;
constexpr int64_t kBytes = 256;
constexpr int64_t kMaxByteVocab = 512;  // bytes, and room for the special tokens behind them

const char kHelp[] =
    R"(usage: cuda-int4-decode MODEL.pte (--prompt TEXT | --prompt-file FILE | --tokens IDS |
                                   --prompts FILE | --token-lists FILE) [options]

Generates from an ExecuTorch language model. What it chooses goes to stdout as it is chosen, the
times to stderr.

prompt (exactly one)
  --prompt TEXT        for a model whose tokens are bytes: the text, byte by byte, behind the
                       model's begin token if it has one
  --prompt-file FILE   the same, from a file ("-" is stdin)
  --tokens IDS         token ids such as 1,15043,3186; ids come back. For models with a tokenizer
                       (to give and get their text: cuda-int4 run MODEL.pte --tokenizer FILE)
  --prompts FILE       several texts, one a line, read and continued together where the model takes
                       several, else one after the other; what they gave comes at the end
  --token-lists FILE   the same of token ids: a line such as 1,15043,3186 for each
  --no-bos             no begin token in front of a text

how much
  --max-new N          stop after N new tokens (default: at a stop token or the end of the context)
  --stop-token ID      stop at this token, besides the model's own end tokens; may be repeated
  --prefill-chunk N    prompt tokens per forward (default: as many as the model takes)

how tokens are chosen
  --temperature T      0: always the likeliest (default); 1: as the model says; higher: wilder
  --top-k K            draw from the K likeliest tokens only (default: 0, off)
  --top-p P            draw from the fewest likeliest tokens that hold P of the probability
                       (default: 1, off)
  --min-p P            draw from tokens at least P times as likely as the likeliest (default: 0,
                       off). Order: temperature, then top-k, then top-p, then min-p.
  --seed N             the same seed gives the same tokens, on any machine (default: 0)
  --sequence N         draws of one seed are independent from one number to another (default: 0);
                       of several prompts the first has this number, the next one the next

model and machine
  --data FILE.ptd      the weights, if they were exported into a file of their own
  --device NAME        auto (default), cpu, cuda or cuda:N
  --no-cuda-graph      on a GPU, launch kernel by kernel always
  --no-device-loop     on a GPU, choose each token on the host; the tokens are the same
  --no-verify          skip the checksums over the weights: a faster start, damage not noticed
  --threads N          CPU threads (default: one per physical core)

output
  --print-tokens       print token ids even for a text prompt
  --json               nothing but one JSON object on stdout: tokens, text, stop_reason, times
  --verbose            ExecuTorch's log too, on stderr
  -h, --help           this
  --version            the version of the library

examples
  cuda-int4-decode byte_llama.pte --prompt 'def main():' --max-new 200
  cuda-int4-decode byte_llama.pte --prompt 'import ' --temperature 0.8 --top-p 0.95 --seed 7
  cuda-int4-decode llama.pte --tokens 1,15043 --stop-token 2 --json
  cuda-int4-decode byte_llama.pte --prompts prompts.txt --max-new 100

Ctrl-C ends after the token in progress, prints the times and exits with 130; a second one ends
at once. Exit codes: 0 done, 1 failed, 2 wrong command line.
)";

struct Options {
  std::string model_path;
  std::string data_path;
  std::string device = "auto";
  std::vector<std::vector<int64_t>> prompts;
  bool is_several = false;
  bool is_text = false;  // the prompt was text: so is the output
  bool bos = true;
  bool print_tokens = false;
  bool json = false;
  bool verify = true;
  bool cuda_graph = true;
  bool device_loop = true;
  bool verbose = false;
  int64_t threads = 0;
  cuda_int4::GenerateConfig config;
};

[[noreturn]] void usage_error(const std::string& message) {
  std::fprintf(stderr, "cuda-int4-decode: %s\nTry cuda-int4-decode --help.\n", message.c_str());
  std::exit(kUsage);
}

int64_t parse_int(const std::string& name, const char* text, int64_t min, int64_t max) {
  char* end = nullptr;
  errno = 0;
  const long long value = std::strtoll(text, &end, 10);
  const bool is_number = (*text == '-' || (*text >= '0' && *text <= '9')) && *end == '\0';
  if (!is_number || errno != 0 || value < min || value > max) {
    const std::string upper = max == INT64_MAX ? "" : " and <= " + std::to_string(max);
    usage_error(name + ": expected an integer >= " + std::to_string(min) + upper + ", got '" +
                text + "'");
  }
  return value;
}

double parse_float(const std::string& name, const char* text) {
  char* end = nullptr;
  errno = 0;
  const double value = std::strtod(text, &end);
  if (end == text || *end != '\0' || !std::isfinite(value)) {
    usage_error(name + ": expected a number, got '" + text + "'");
  }
  return value;
}

std::vector<int64_t> parse_tokens(const char* name, const std::string& list) {
  std::vector<int64_t> tokens;
  size_t begin = 0;
  while (begin <= list.size()) {
    const size_t end = std::min(list.find(',', begin), list.size());
    tokens.push_back(parse_int(name, list.substr(begin, end - begin).c_str(), 0, INT64_MAX));
    begin = end + 1;
  }
  return tokens;
}

std::string read_prompt_file(const std::string& name, const std::string& path) {
  std::FILE* file = path == "-" ? stdin : std::fopen(path.c_str(), "rb");
  if (file == nullptr) usage_error(name + ": " + path + ": " + std::strerror(errno));
  std::string text;
  char buffer[65536];
  for (size_t n; (n = std::fread(buffer, 1, sizeof(buffer), file)) > 0;) text.append(buffer, n);
  const bool failed = std::ferror(file) != 0;
  if (file != stdin) std::fclose(file);
  if (failed) usage_error(name + ": cannot read " + path);
  return text;
}

void set_prompts(Options* options, std::vector<std::vector<int64_t>> prompts, bool is_text) {
  if (!options->prompts.empty()) {
    usage_error(
        "expected one of --prompt, --prompt-file, --tokens, --prompts and --token-lists, got two");
  }
  for (const std::vector<int64_t>& tokens : prompts)
    if (tokens.empty()) usage_error("expected a prompt of at least one byte, got an empty one");
  options->prompts = std::move(prompts);
  options->is_text = is_text;
}

/// Without their ends; what is behind the last end of a line is a line if there is anything.
std::vector<std::string> lines_of(const std::string& name, const std::string& text) {
  std::vector<std::string> lines;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find('\n', begin), text.size());
    lines.push_back(text.substr(begin, end - begin));
    if (!lines.back().empty() && lines.back().back() == '\r') lines.back().pop_back();
    begin = end + 1;
  }
  if (lines.empty()) usage_error(name + ": expected a line for each prompt, got an empty file");
  return lines;
}

std::vector<int64_t> bytes_of(const std::string& text) {
  std::vector<int64_t> tokens;
  for (const char c : text) tokens.push_back(static_cast<unsigned char>(c));
  return tokens;
}

enum Option : int {
  kPrompt = 256,
  kPromptFile,
  kTokens,
  kPrompts,
  kTokenLists,
  kNoBos,
  kMaxNew,
  kStopToken,
  kPrefillChunk,
  kTemperature,
  kTopK,
  kTopP,
  kMinP,
  kSeed,
  kSequence,
  kData,
  kDevice,
  kNoCudaGraph,
  kNoDeviceLoop,
  kNoVerify,
  kThreads,
  kPrintTokens,
  kJson,
  kVerbose,
  kVersion,
};

const struct option kLongOptions[] = {
    {"prompt", required_argument, nullptr, kPrompt},
    {"prompt-file", required_argument, nullptr, kPromptFile},
    {"tokens", required_argument, nullptr, kTokens},
    {"prompts", required_argument, nullptr, kPrompts},
    {"token-lists", required_argument, nullptr, kTokenLists},
    {"no-bos", no_argument, nullptr, kNoBos},
    {"max-new", required_argument, nullptr, kMaxNew},
    {"stop-token", required_argument, nullptr, kStopToken},
    {"prefill-chunk", required_argument, nullptr, kPrefillChunk},
    {"temperature", required_argument, nullptr, kTemperature},
    {"top-k", required_argument, nullptr, kTopK},
    {"top-p", required_argument, nullptr, kTopP},
    {"min-p", required_argument, nullptr, kMinP},
    {"seed", required_argument, nullptr, kSeed},
    {"sequence", required_argument, nullptr, kSequence},
    {"data", required_argument, nullptr, kData},
    {"device", required_argument, nullptr, kDevice},
    {"no-cuda-graph", no_argument, nullptr, kNoCudaGraph},
    {"no-device-loop", no_argument, nullptr, kNoDeviceLoop},
    {"no-verify", no_argument, nullptr, kNoVerify},
    {"threads", required_argument, nullptr, kThreads},
    {"print-tokens", no_argument, nullptr, kPrintTokens},
    {"json", no_argument, nullptr, kJson},
    {"verbose", no_argument, nullptr, kVerbose},
    {"help", no_argument, nullptr, 'h'},
    {"version", no_argument, nullptr, kVersion},
    {nullptr, 0, nullptr, 0},
};

void apply_option(int option, const char* value, Options* options) {
  cuda_int4::GenerateConfig& config = options->config;
  switch (option) {
    case kPrompt:
      return set_prompts(options, {bytes_of(value)}, true);
    case kPromptFile:
      return set_prompts(options, {bytes_of(read_prompt_file("--prompt-file", value))}, true);
    case kTokens:
      return set_prompts(options, {parse_tokens("--tokens", value)}, false);
    case kPrompts:
    case kTokenLists: {
      const bool is_text = option == kPrompts;
      const char* name = is_text ? "--prompts" : "--token-lists";
      std::vector<std::vector<int64_t>> prompts;
      for (const std::string& line : lines_of(name, read_prompt_file(name, value)))
        prompts.push_back(is_text ? bytes_of(line) : parse_tokens(name, line));
      options->is_several = true;
      return set_prompts(options, std::move(prompts), is_text);
    }
    case kNoBos:
      options->bos = false;
      return;
    case kMaxNew:
      config.max_new_tokens = parse_int("--max-new", value, 1, INT64_MAX);
      return;
    case kStopToken:
      config.stop_tokens.push_back(parse_int("--stop-token", value, 0, INT64_MAX));
      return;
    case kPrefillChunk:
      config.prefill_chunk = parse_int("--prefill-chunk", value, 1, INT64_MAX);
      return;
    case kTemperature:
      config.sampler.temperature = parse_float("--temperature", value);
      return;
    case kTopK:
      config.sampler.top_k = parse_int("--top-k", value, 0, INT64_MAX);
      return;
    case kTopP:
      config.sampler.top_p = parse_float("--top-p", value);
      return;
    case kMinP:
      config.sampler.min_p = parse_float("--min-p", value);
      return;
    case kSequence:
      config.sampler.sequence = static_cast<uint64_t>(parse_int("--sequence", value, 0, INT64_MAX));
      return;
    case kSeed:
      config.sampler.seed = static_cast<uint64_t>(parse_int("--seed", value, 0, INT64_MAX));
      return;
    case kData:
      options->data_path = value;
      return;
    case kDevice:
      options->device = value;
      return;
    case kNoVerify:
      options->verify = false;
      break;
    case kNoDeviceLoop:
      options->device_loop = false;
      return;
    case kNoCudaGraph:
      options->cuda_graph = false;
      return;
    case kThreads:
      options->threads = parse_int("--threads", value, 1, 1024);
      return;
    case kPrintTokens:
      options->print_tokens = true;
      return;
    case kJson:
      options->json = true;
      return;
    case kVerbose:
      options->verbose = true;
      return;
    case kVersion:
      std::printf("cuda-int4-decode %s\n", cuda_int4_version());
      std::exit(0);
    case 'h':
      std::fputs(kHelp, stdout);
      std::exit(0);
    default:
      std::fputs("Try cuda-int4-decode --help.\n", stderr);
      std::exit(kUsage);
  }
}

Options parse_options(int argc, char** argv) {
  Options options;
  for (int option; (option = getopt_long(argc, argv, "h", kLongOptions, nullptr)) != -1;) {
    apply_option(option, optarg, &options);
  }
  if (optind >= argc) usage_error("expected the path of a .pte, got none");
  options.model_path = argv[optind];
  if (optind + 1 < argc) {
    usage_error(std::string("expected one .pte, got '") + argv[optind + 1] + "' besides");
  }
  if (options.prompts.empty()) {
    usage_error("expected one of --prompt, --prompt-file, --tokens, --prompts and --token-lists");
  }
  const std::string& device = options.device;
  const bool is_gpu =
      device == "cuda" || (device.size() > 5 && device.compare(0, 5, "cuda:") == 0 &&
                           device.find_first_not_of("0123456789", 5) == std::string::npos);
  if (device != "auto" && device != "cpu" && !is_gpu) {
    usage_error("--device: expected auto, cpu, cuda or cuda:N, got '" + device + "'");
  }
  const cuda_int4::Status status = validate_sampler_config(options.config.sampler);
  if (!status.ok()) usage_error(status.message);
  return options;
}

std::atomic<bool> interrupted{false};
static_assert(std::atomic<bool>::is_always_lock_free, "set in a signal handler");

void handle_interrupts() {
  struct sigaction action = {};
  action.sa_handler = [](int) { interrupted.store(true, std::memory_order_relaxed); };
  action.sa_flags = SA_RESETHAND | SA_RESTART;  // the second Ctrl-C is the default one
  sigaction(SIGINT, &action, nullptr);
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

int fail() {
  std::fprintf(stderr, "cuda-int4-decode: %s\n", cuda_int4_last_error());
  return kFailed;
}

void print_token(const Options& options, bool as_text, int64_t token, bool first) {
  if (options.json) return;
  if (!as_text) {
    std::printf(first ? "%" PRId64 : " %" PRId64, token);
  } else if (token < kBytes) {
    std::fputc(static_cast<int>(token), stdout);
  }
  std::fflush(stdout);
}

/// What each of several gave, behind its number.
void print_several(const Options& options, bool as_text,
                   const std::vector<std::vector<int64_t>>& chosen) {
  for (size_t i = 0; i < chosen.size() && !options.json; ++i) {
    std::printf("[%zu] ", i + 1);
    for (size_t j = 0; j < chosen[i].size(); ++j)
      print_token(options, as_text, chosen[i][j], j == 0);
    std::fputc('\n', stdout);
  }
}

int run(const Options& options) {
  if (options.threads > 0 && cuda_int4_set_num_threads(uint32_t(options.threads)) != 0)
    return fail();
  const auto start = std::chrono::steady_clock::now();
  std::unique_ptr<Model> model;
  const char* path = options.model_path.c_str();
  const char* data_path = options.data_path.empty() ? nullptr : options.data_path.c_str();
  cuda_int4::ModelOptions model_options;
  model_options.device = options.device;
  model_options.verify = options.verify;
  model_options.cuda_graph = options.cuda_graph;
  model_options.device_loop = options.device_loop;
  if (Model::open(path, data_path, model_options, &model) != Error::Ok) return fail();
  std::unique_ptr<Decoder> decoder;
  if (Decoder::create(*model, &decoder) != Error::Ok) return fail();
  const double load_s = seconds_since(start);

  const int64_t vocab_size = decoder->info().vocab_size;
  if (options.is_text && vocab_size > kMaxByteVocab) {
    std::fprintf(
        stderr,
        "cuda-int4-decode: %s: expected a model whose tokens are bytes, got one of %" PRId64
        " tokens; give --tokens, or let cuda-int4 run --tokenizer FILE make them\n",
        path, vocab_size);
    return kFailed;
  }
  std::vector<std::vector<int64_t>> prompts = options.prompts;
  if (options.is_text && options.bos && decoder->info().bos_id >= 0) {
    for (std::vector<int64_t>& prompt : prompts)
      prompt.insert(prompt.begin(), decoder->info().bos_id);
  }
  const bool as_text = options.is_text && !options.print_tokens;

  const size_t n = prompts.size();
  std::vector<std::vector<int64_t>> chosen(n);
  std::vector<cuda_int4::GenerateRequest> requests(n);
  constexpr int64_t kMaxReserve = int64_t{1} << 20;  // the file's word for the context is no limit
  for (size_t i = 0; i < n; ++i) {
    chosen[i].reserve(static_cast<size_t>(std::min(decoder->info().max_context_len, kMaxReserve)) /
                      n);
    requests[i].prompt = prompts[i].data();
    requests[i].n_prompt = int64_t(prompts[i].size());
    requests[i].config = options.config;
    requests[i].config.sampler.sequence += i;
    requests[i].callbacks.on_prefill = [](int64_t) {
      return !interrupted.load(std::memory_order_relaxed);
    };
    requests[i].callbacks.on_token = [&options, &tokens = chosen[i], as_text](int64_t token) {
      if (!options.is_several) print_token(options, as_text, token, tokens.empty());
      tokens.push_back(token);
      return !interrupted.load(std::memory_order_relaxed);
    };
  }
  std::vector<GenerateStats> stats(n);
  GenerateStats total;
  const auto error = decoder->generate(requests.data(), n, stats.data(), &total);
  if (options.is_several) print_several(options, as_text, chosen);
  if (!options.json && !options.is_several && !chosen[0].empty()) std::fputc('\n', stdout);
  if (error != Error::Ok) return fail();

  if (options.json) {
    const std::string json =
        options.is_several ? cuda_int4::report_json(stats, total, load_s, chosen, options.is_text)
                           : cuda_int4::report_json(stats[0], load_s, chosen[0], options.is_text);
    std::printf("%s\n", json.c_str());
  } else {
    std::fflush(stdout);
    const GenerateStats& shown = options.is_several ? total : stats[0];
    std::fprintf(stderr, "%s", cuda_int4::report_text(shown, load_s).c_str());
  }
  if (std::fflush(stdout) != 0 || std::ferror(stdout)) {
    std::fprintf(stderr, "cuda-int4-decode: cannot write to stdout\n");
    return kFailed;
  }
  return interrupted ? kInterrupted : 0;
}

}  // namespace

int main(int argc, char** argv) {
  const Options options = parse_options(argc, argv);
  if (!options.verbose) cuda_int4_keep_log_quiet();
  handle_interrupts();
  return run(options);
}
