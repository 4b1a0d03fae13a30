// A native thread with a queue: runs tasks one after another, in the order they were posted.
#pragma once

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>

namespace tandem {

class Task {
 public:
  virtual ~Task() = default;
  // On the thread; must not throw. Gives the task itself up to whoever goes on with it.
  static void Execute(std::unique_ptr<Task> task) { task.release()->Run(); }

 protected:
  virtual void Run() = 0;  // takes ownership of this
};

class TaskThread {
 public:
  TaskThread() : thread_([this] { Loop(); }) {}
  // Nothing may be queued any more. Not on the thread itself.
  ~TaskThread() { Stop(); }
  TaskThread(const TaskThread&) = delete;
  TaskThread& operator=(const TaskThread&) = delete;

  void Post(std::unique_ptr<Task> task) {
    const std::lock_guard<std::mutex> lock(mutex_);
    queue_.push_back(std::move(task));
    changed_.notify_one();
  }

  // Drops what is queued and waits for the task that runs. Safe to call twice.
  void Stop() {
    std::deque<std::unique_ptr<Task>> dropped;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
      dropped.swap(queue_);
      changed_.notify_one();
    }
    if (thread_.joinable()) thread_.join();
  }

 private:
  void Loop() {
    for (;;) {
      std::unique_ptr<Task> task;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, [this] { return stopping_ || !queue_.empty(); });
        if (stopping_) return;
        task = std::move(queue_.front());
        queue_.pop_front();
      }
      Task::Execute(std::move(task));
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::unique_ptr<Task>> queue_;
  bool stopping_ = false;
  std::thread thread_;  // last: it uses the others
};

}  // namespace tandem
